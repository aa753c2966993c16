"""Opening an .onnx file that nobody vouches for: every stored tensor is checked before it is read.

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

KNOWN = {"location", "offset", "length", "checksum", "basepath"}
TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
"""The fields of a tensor that hold numbers one by one, beside raw_data."""
MAX_MODEL = 1 << 31
"""Bytes of an .onnx file without its data: protobuf's own limit."""
MAX_NODES = 200_000
"""Nodes of a model with its functions written out."""
INLINED, TIMES = 20_000, 20
"""Of these, those that functions are written out to: so many, and so many times those of the file.
Sixteen functions that call each other twice are 131,070 nodes, in a file of four kilobytes."""
WITHOUT = {"ValueInfoProto", "StringStringEntryProto"}
"""Messages that are many, and that no tensor lies in."""


def _damaged(what: str) -> LoraFxError:
    return LoraFxError(what, "the download or copy may be incomplete; fetch the file again")


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Open a model and check that its tensors are all there; large ones stay in their files.

    Raises:
        LoraFxError: It is no ONNX file, or the bytes of a tensor are not where the file says.
    """
    file = Path(path)
    proto = checked(file)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises whatever its parts raise
        raise _damaged(f"{file}: damaged ONNX file: {one_line(error)}") from error
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        ir.external_data.set_base_dir(graph, file.parent)
    return model


def data_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the files beside a model that hold its tensors; the tensors are checked.

    Raises:
        LoraFxError: It is no ONNX file, or the bytes of a tensor are not where the file says.
    """
    proto = checked(path)
    entries = (e for t in _tensors(proto) for e in t.external_data)
    return list(dict.fromkeys(e.value for e in entries if e.key == "location"))


def checked(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The model of a file as protobuf, its tensors and sizes checked.

    Raises:
        LoraFxError: As load.
    """
    file = Path(path)
    proto = _proto(file)
    stored = len(proto.graph.node) + sum(len(f.node) for f in proto.functions)
    count = stored if stored > MAX_NODES else _node_count(file, proto)
    most = min(MAX_NODES, max(stored, INLINED + TIMES * stored))
    if count > most and (count > MAX_NODES or proto.functions):
        raise LoraFxError(
            f"{file}: {count} nodes, functions written out; at most {most} are read",
            "split the model, or let its exporter fold constants",
        )
    sums: dict[Path, str] = {}
    for tensor in _tensors(proto):
        _check(file, tensor, sums)
    names = Counter(t.name for t in proto.graph.initializer if t.name)
    twice = [n for n, k in names.items() if k > 1]
    if twice:
        raise _damaged(f"{file}: two initialisers are called {twice[0]!r}")
    return proto


def _node_count(file: Path, proto: onnx.ModelProto) -> int:
    """Nodes of the model once every call of a function is written out."""
    bodies = {(f.domain, f.name, f.overload): f.node for f in proto.functions}
    known: dict[tuple[str, str, str], int | None] = {}  # None while a body is counted

    def count(nodes: Iterable[onnx.NodeProto]) -> int:
        found = 0
        for node in nodes:
            name = (node.domain, node.op_type, node.overload)
            found += of_function(name) if name in bodies else 1
            for a in node.attribute:
                found += sum(count(g.node) for g in a.graphs)
                found += count(a.g.node) if a.HasField("g") else 0
        return found

    def of_function(name: tuple[str, str, str]) -> int:
        if name not in known:
            known[name] = None
            known[name] = count(bodies[name])
        found = known[name]
        if found is None:
            raise _damaged(f"{file}: the function {name[1]!r} calls itself")
        return found

    try:
        return count(proto.graph.node)
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
                f"{file}: a zip archive, such as a .pt2, and no ONNX file",
                "lora-fx export MODEL -o X.onnx writes one",
            ) from error
        raise _damaged(f"{file}: damaged ONNX file: {one_line(error)}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise _damaged(f"{file}: no ONNX model: it has no graph or no opset")
    return proto


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every stored tensor: initialisers, sparse ones, and those in attributes and bodies."""
    for field, value in message.ListFields():
        kind = field.message_type
        if kind is None or kind.name in WITHOUT:
            continue
        for part in [value] if isinstance(value, Message) else value:
            if kind.name == "TensorProto":
                yield part
            else:
                yield from _tensors(part)


def _check(file: Path, tensor: onnx.TensorProto, sums: dict[Path, str]) -> None:
    """Raise where a tensor's sizes and bytes do not agree; `sums` keeps those of data files."""
    name = f"{file}: tensor {tensor.name!r}"
    dims = list(tensor.dims)
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if bool(tensor.external_data) != external:
        there = "a place in a data file and no mark" if tensor.external_data else "a mark and none"
        raise _damaged(f"{name} has {there} that its bytes lie there")
    if any(d < 0 for d in dims):
        raise _damaged(f"{name} has sizes {dims}; expected none below 0")
    if len(dims) > MAX_DIMS:
        raise _damaged(f"{name} has {len(dims)} axes; at most {MAX_DIMS} are read")
    if tensor.data_type == onnx.TensorProto.STRING:
        if external or tensor.HasField("raw_data") or len(tensor.string_data) != math.prod(dims):
            raise _damaged(f"{name}: its texts do not fit its sizes {dims}")
        return
    if tensor.data_type not in [*ir.DataType] or not tensor.data_type:
        raise _damaged(f"{name} has the unknown dtype {tensor.data_type}")
    kind, typed = ir.DataType(tensor.data_type), sum(len(getattr(tensor, f)) for f in TYPED)
    stored = -(-math.prod(dims) // max(1, 8 // kind.bitwidth))  # a byte has several small numbers
    wanted = stored * max(1, kind.bitwidth // 8)
    if external:
        _external(file, name, tensor, wanted, sums)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != wanted:
        raise _damaged(f"{name} holds {len(tensor.raw_data)} bytes; {dims} needs {wanted}")
    elif not tensor.HasField("raw_data") and typed != stored * (1 + ("COMPLEX" in kind.name)):
        raise _damaged(f"{name} holds {typed} numbers; {dims} needs {wanted} bytes")


def _external(
    file: Path, name: str, tensor: onnx.TensorProto, wanted: int, sums: dict[Path, str]
) -> None:
    entries = {e.key: e.value for e in tensor.external_data}
    twice = len(entries) < len(tensor.external_data)  # readers differ in which one they take
    odd = ["given twice"] if twice else sorted(set(entries) - KNOWN)
    if odd:
        raise _damaged(f"{name} has the unknown external key {odd[0]!r}")
    location = entries.get("location", "")
    data = _data_file(file, name, location)
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries["length"]) if entries.get("length") else wanted
    except ValueError as error:
        found = {k: entries.get(k) for k in ("offset", "length")}
        raise _damaged(f"{name} has {found}; expected whole numbers") from error
    size = data.stat().st_size
    if length != wanted:
        needs = f"{list(tensor.dims)} needs {wanted}"
        raise _damaged(f"{name} has {length} bytes in {location}; {needs}")
    if offset < 0 or offset + wanted > size:
        raise _damaged(
            f"{name} lies at bytes {offset} to {offset + wanted} of {location}, which has {size}"
        )
    if said := entries.get("checksum"):
        if data not in sums:
            with open_input(data) as opened:
                sums[data] = hashlib.file_digest(opened, "sha1").hexdigest()
        if said.lower() != sums[data]:
            raise _damaged(
                f"{name}: {location} has the SHA-1 sum {sums[data]}; expected {one_line(said, 60)}"
            )


def _data_file(file: Path, name: str, location: str) -> Path:
    """The data file of a tensor, which has to lie in the model's own folder."""
    data, home = inside(file.parent, location), file.parent.resolve()
    if data is None or home not in data.parents:  # the runtime follows no links out of it
        raise LoraFxError(
            f"{name} is said to lie in {location!r}, outside the folder of the model",
            "data files lie beside the model; a cache of links has to be copied (cp -rL) first",
        )
    if not data.is_file():
        raise _damaged(f"{name} lies in {location}, which is missing")
    with open_input(data) as f:
        refuse_pointer(f.read(64), data.stat().st_size, data)
    if data.stat().st_nlink > 1:
        raise LoraFxError(
            f"{data} has {data.stat().st_nlink} hard links; the onnx package refuses such data",
            "copy the file",
        )
    return data
