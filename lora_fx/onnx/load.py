"""Opening of untrusted .onnx files: every stored tensor is checked before it is read.

The checker of the onnx package and onnx_ir both accept tensors whose bytes are too few, lie past
the end of the data file or have negative sizes, and fail late or write a corrupt copy.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import Message

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.links import inside
from lora_fx.files.read import open_input, read_bytes, refuse_pointer
from lora_fx.files.safetensors import MAX_DIMS
from lora_fx.probe.probe import PROPERTY as PROBE

KNOWN = {"location", "offset", "length", "checksum", "basepath"}
TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
"""The fields of a tensor, other than raw_data, that hold numbers."""
MAX_MODEL = 1 << 31
"""The largest size in bytes of an .onnx file without its data: protobuf's limit."""
MAX_NODES = 200_000
"""The most nodes of a model after its functions are inlined."""
INLINED = 20_000
"""Nodes that inlining may make of any file, in addition to TIMES the file's own nodes. Sixteen
functions that each call the next one twice are 131,070 nodes, in a file of four kilobytes."""
TIMES = 20
WITHOUT = {"ValueInfoProto", "StringStringEntryProto"}
"""Messages that are frequent and contain no tensor."""


def _damaged(what: str) -> LoraFxError:
    return LoraFxError(what, "the download or copy may be incomplete; fetch the file again")


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Open a model and check all its tensors; large ones stay in their files.

    What is made of the model computes other numbers, so that its probe is left out.

    Raises:
        LoraFxError: It is no ONNX file, or the bytes of a tensor are not where the file says.
    """
    file = Path(path)
    proto = checked(file)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises whatever its parts raise
        raise _damaged(f"{file}: damaged ONNX file: {one_line(error)}") from error
    model.metadata_props.pop(PROBE, None)
    functions = (function.graph for function in model.functions.values())
    for graph in (model.graph, *functions):
        ir.external_data.set_base_dir(graph, file.parent)
    return model


def data_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of a model's data files; their tensors are checked.

    Raises:
        LoraFxError: It is no ONNX file, or the bytes of a tensor are not where the file says.
    """
    proto = checked(path)
    names = []
    for tensor in _tensors(proto):
        names += [entry.value for entry in tensor.external_data if entry.key == "location"]
    return list(dict.fromkeys(names))


def checked(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Return the model in a file as protobuf, with tensors and sizes checked.

    Raises:
        LoraFxError: As load.
    """
    file = Path(path)
    proto = _proto(file)
    _refuse_many_nodes(file, proto)
    sums: dict[Path, str] = {}
    for tensor in _tensors(proto):
        _check(file, tensor, sums)
    counts = Counter(tensor.name for tensor in proto.graph.initializer if tensor.name)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise _damaged(f"{file}: two initialisers are called {repeated[0]!r}")
    return proto


def _refuse_many_nodes(file: Path, proto: onnx.ModelProto) -> None:
    """Raise if a model has too many nodes, before or after functions are inlined."""
    stored = len(proto.graph.node) + sum(len(function.node) for function in proto.functions)
    count = stored if stored > MAX_NODES else _node_count(file, proto)
    most = min(MAX_NODES, max(stored, INLINED + TIMES * stored))
    if count > most and (count > MAX_NODES or proto.functions):
        raise LoraFxError(
            f"{file}: {count} nodes when functions are inlined; at most {most} are read",
            "split the model, or let its exporter fold constants",
        )


def _node_count(file: Path, proto: onnx.ModelProto) -> int:
    """Return the number of nodes after every function call is inlined.

    Raises:
        LoraFxError: A function calls itself, or they call each other too deeply.
    """
    bodies = {(f.domain, f.name, f.overload): f.node for f in proto.functions}
    counts: dict[tuple[str, str, str], int | None] = {}  # None while a body is counted

    def count_nodes(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in nodes:
            name = (node.domain, node.op_type, node.overload)
            total += count_function(name) if name in bodies else 1
            for attribute in node.attribute:
                total += sum(count_nodes(graph.node) for graph in attribute.graphs)
                if attribute.HasField("g"):
                    total += count_nodes(attribute.g.node)
        return total

    def count_function(name: tuple[str, str, str]) -> int:
        if name not in counts:
            counts[name] = None
            counts[name] = count_nodes(bodies[name])
        count = counts[name]
        if count is None:
            raise _damaged(f"{file}: the function {name[1]!r} calls itself")
        return count

    try:
        return count_nodes(proto.graph.node)
    except RecursionError as error:
        raise _damaged(f"{file}: its functions call each other too deeply") from error


def _proto(file: Path) -> onnx.ModelProto:
    data = read_bytes(file, most=MAX_MODEL)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError has no public home
        if data[:2] == b"PK":
            raise LoraFxError(
                f"{file}: a zip archive such as a .pt2 file, not an ONNX file",
                "write an ONNX file with lora-fx export MODEL -o X.onnx",
            ) from error
        if _starts_like_safetensors(data):
            raise LoraFxError(
                f"{file}: a safetensors file, not an ONNX file",
                "write an ONNX file with lora-fx export MODEL -o X.onnx",
            ) from error
        raise _damaged(f"{file}: damaged ONNX file: {one_line(error)}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise _damaged(f"{file}: not an ONNX model: it has no graph or no opset")
    return proto


def _starts_like_safetensors(data: bytes) -> bool:
    """Whether bytes begin as a safetensors file does: 8 bytes of a length, and JSON."""
    length = int.from_bytes(data[:8], "little")
    return data[8:9] == b"{" and length <= len(data) - 8


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Yield every stored tensor: initialisers, sparse ones, in attributes and in bodies."""
    for field, value in message.ListFields():
        message_type = field.message_type
        if message_type is None or message_type.name in WITHOUT:
            continue
        messages = [value] if isinstance(value, Message) else value
        for inner in messages:
            if message_type.name == "TensorProto":
                yield inner
            else:
                yield from _tensors(inner)


def _check(file: Path, tensor: onnx.TensorProto, sums: dict[Path, str]) -> None:
    """Raise if a tensor's sizes and bytes do not agree.

    Args:
        file: The model.
        tensor: One of its tensors.
        sums: Keeps the SHA-1 sums of data files.

    Raises:
        LoraFxError: The file is damaged, or says a place that is not read.
    """
    name = f"{file}: tensor {tensor.name!r}"
    sizes = list(tensor.dims)
    is_external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if tensor.external_data and not is_external:
        raise _damaged(f"{name} names a place in a data file, but is not marked as external data")
    if is_external and not tensor.external_data:
        raise _damaged(f"{name} is marked as external data, but names no place in a data file")
    if any(size < 0 for size in sizes):
        raise _damaged(f"{name} has sizes {sizes}; expected no negative sizes")
    if len(sizes) > MAX_DIMS:
        raise _damaged(f"{name} has {len(sizes)} axes; at most {MAX_DIMS} are read")
    if tensor.data_type == onnx.TensorProto.STRING:
        in_bytes = is_external or tensor.HasField("raw_data")
        if in_bytes or len(tensor.string_data) != math.prod(sizes):
            raise _damaged(f"{name}: its number of strings does not fit its sizes {sizes}")
        return
    if tensor.data_type not in [*ir.DataType] or not tensor.data_type:
        raise _damaged(f"{name} has the unknown dtype {tensor.data_type}")

    dtype = ir.DataType(tensor.data_type)
    numbers_a_byte = max(1, 8 // dtype.bitwidth)  # a byte has several small numbers
    stored = -(-math.prod(sizes) // numbers_a_byte)
    needed = stored * max(1, dtype.bitwidth // 8)
    if is_external:
        _check_external(file, name, tensor, needed, sums)
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != needed:
            raise _damaged(
                f"{name} holds {len(tensor.raw_data)} bytes; its sizes {sizes} need {needed}"
            )
    else:
        typed = sum(len(getattr(tensor, field)) for field in TYPED)
        numbers_an_element = 2 if "COMPLEX" in dtype.name else 1
        if typed != stored * numbers_an_element:
            raise _damaged(f"{name} holds {typed} numbers; its sizes {sizes} need {needed} bytes")


def _check_external(
    file: Path, name: str, tensor: onnx.TensorProto, needed: int, sums: dict[Path, str]
) -> None:
    """Raise if a tensor's external data is not where the file says.

    Args:
        file: The model.
        name: The file and the tensor, for messages.
        tensor: The tensor.
        needed: How many bytes it needs.
        sums: As in `_check`.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    unknown_keys = sorted(set(entries) - KNOWN)
    if len(entries) < len(tensor.external_data):  # readers differ in which one they take
        unknown_keys = ["given twice"]
    if unknown_keys:
        raise _damaged(f"{name} has the unknown external key {unknown_keys[0]!r}")
    location = entries.get("location", "")
    data = _data_file(file, name, location)
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or needed)
    except ValueError as error:
        numbers = {key: entries.get(key) for key in ("offset", "length")}
        raise _damaged(f"{name} has {numbers}; expected whole numbers") from error
    if length != needed:
        needs = f"{list(tensor.dims)} needs {needed}"
        raise _damaged(f"{name} has {length} bytes in {location}; {needs}")
    size = data.stat().st_size
    if offset < 0 or offset + needed > size:
        raise _damaged(
            f"{name} is at bytes {offset} to {offset + needed} of {location}, which has only {size}"
        )
    checksum = entries.get("checksum")
    if checksum and checksum.lower() != _sha1(data, sums):
        raise _damaged(
            f"{name}: {location} has the SHA-1 sum {sums[data]}; expected {one_line(checksum, 60)}"
        )


def _sha1(data: Path, sums: dict[Path, str]) -> str:
    """Return the SHA-1 sum of a data file; `sums` caches it."""
    if data not in sums:
        with open_input(data) as opened:
            sums[data] = hashlib.file_digest(opened, "sha1").hexdigest()
    return sums[data]


def _data_file(file: Path, name: str, location: str) -> Path:
    """Return the data file of a tensor, which must be in the model's folder.

    Args:
        file: The model.
        name: The file and the tensor, for messages.
        location: Where the tensor says that its bytes lie.

    Raises:
        LoraFxError: It lies elsewhere, is missing, or the onnx package would refuse it.
    """
    data = inside(file.parent, location)
    folder = file.parent.resolve()
    if data is None or folder not in data.parents:  # the runtime follows no links out of it
        raise LoraFxError(
            f"{name} names the data file {location!r}, which is outside the folder of the model",
            "put the data files into the folder of the model; copy a cache of links first (cp -rL)",
        )
    if not data.is_file():
        raise _damaged(f"{name} names the data file {location}, which is missing")
    with open_input(data) as opened:
        refuse_pointer(opened.read(64), data.stat().st_size, data)
    if data.stat().st_nlink > 1:
        raise LoraFxError(
            f"{data} has {data.stat().st_nlink} hard links; the onnx package refuses such data",
            "copy the file, so that it has no other link",
        )
    return data
