"""Opening an .onnx file that nobody vouches for: every stored tensor is checked before it is read.

The checker of the onnx package and onnx_ir both accept tensors whose bytes are too few, lie past
the end of the data file or have negative sizes, and fail late or write a corrupt copy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from lora_fx.errors import LoraFxError, one_line

DAMAGED = "the download or copy may be incomplete; fetch the file again"
LFS = b"version https://git-lfs"
KNOWN = {"location", "offset", "length", "checksum", "basepath"}
TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
"""The fields of a tensor that hold numbers one by one, beside raw_data."""
HALF_BYTE = {"INT4", "UINT4", "FLOAT4E2M1"}
QUARTER_BYTE = {"INT2", "UINT2"}


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Open a model and check that its tensors are all there; large ones stay in their files.

    Raises:
        LoraFxError: It is no ONNX file, or the bytes of a tensor are not where the file says.
    """
    file = Path(path)
    proto = _proto(file)
    training = [g for t in proto.training_info for g in (t.initialization, t.algorithm)]
    for graph in (proto.graph, *training):
        for tensor in _tensors(graph, proto.functions):
            _check(file, tensor)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises whatever its parts raise
        raise LoraFxError(f"{file}: damaged ONNX file: {one_line(error)}", DAMAGED) from error
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        ir.external_data.set_base_dir(graph, file.parent)
    return model


def data_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the files beside a model that hold its tensors; the tensors are checked.

    Raises:
        LoraFxError: It is no ONNX file, or the bytes of a tensor are not where the file says.
    """
    file = Path(path)
    proto = _proto(file)
    names: dict[str, None] = {}
    for tensor in _tensors(proto.graph, proto.functions):
        _check(file, tensor)
        names |= {e.value: None for e in tensor.external_data if e.key == "location"}
    return list(names)


def _proto(file: Path) -> onnx.ModelProto:
    try:
        with file.open("rb") as f:
            head = f.read(len(LFS))
            if head == LFS:
                raise LoraFxError(f"{file}: a git-lfs pointer, not the model", "git lfs pull")
            data = head + f.read()
    except OSError as error:
        raise LoraFxError(f"{file}: {error.strerror}", "is the path right?") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError has no public home
        raise LoraFxError(f"{file}: damaged ONNX file: {one_line(error)}", DAMAGED) from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise LoraFxError(f"{file}: no ONNX model: it has no graph or no opset", DAMAGED)
    return proto


def _tensors(
    graph: onnx.GraphProto, functions: Iterable[onnx.FunctionProto] = ()
) -> Iterator[onnx.TensorProto]:
    """Every stored tensor: initialisers, sparse ones, and those in attributes and bodies."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    nodes = [*graph.node, *(n for f in functions for n in f.node)]
    attributes = [a for n in nodes for a in n.attribute]
    attributes += [a for f in functions for a in f.attribute_proto]
    for a in attributes:
        if a.HasField("t"):
            yield a.t
        yield from a.tensors
        for sparse in (a.sparse_tensor, *a.sparse_tensors):
            yield from (sparse.values, sparse.indices) if sparse.dims else ()
        for body in (*([a.g] if a.HasField("g") else []), *a.graphs):
            yield from _tensors(body)


def _check(file: Path, tensor: onnx.TensorProto) -> None:
    """Raise where a tensor's sizes and bytes do not agree."""
    name = f"{file}: tensor {tensor.name!r}"
    dims = list(tensor.dims)
    if any(d < 0 for d in dims):
        raise LoraFxError(f"{name} has sizes {dims}; expected none below 0", DAMAGED)
    if tensor.data_type == onnx.TensorProto.STRING:
        return
    if tensor.data_type not in onnx.TensorProto.DataType.values() or not tensor.data_type:
        raise LoraFxError(f"{name} has the unknown dtype {tensor.data_type}", DAMAGED)
    wanted = _bytes(tensor.data_type, math.prod(dims))
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _external(file, name, tensor, wanted)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != wanted:
        raise LoraFxError(
            f"{name} holds {len(tensor.raw_data)} bytes; {dims} needs {wanted}", DAMAGED
        )
    elif (
        wanted
        and not tensor.HasField("raw_data")
        and not any(len(getattr(tensor, n)) for n in TYPED)
    ):
        raise LoraFxError(f"{name} holds 0 bytes; {dims} needs {wanted}", DAMAGED)


def _bytes(dtype: int, count: int) -> int:
    kind = onnx.TensorProto.DataType.Name(dtype)
    if kind in HALF_BYTE:
        return -(-count // 2)
    if kind in QUARTER_BYTE:
        return -(-count // 4)
    return count * onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize


def _external(file: Path, name: str, tensor: onnx.TensorProto, wanted: int) -> None:
    entries = {e.key: e.value for e in tensor.external_data}
    twice = len(entries) < len(tensor.external_data)  # readers differ in which one they take
    odd = ["given twice"] if twice else sorted(set(entries) - KNOWN)
    if odd:
        raise LoraFxError(f"{name} has the unknown external key {odd[0]!r}", DAMAGED)
    location = entries.get("location", "")
    data = _data_file(file, name, location)
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries["length"]) if entries.get("length") else wanted
    except ValueError as error:
        found = {k: entries.get(k) for k in ("offset", "length")}
        raise LoraFxError(f"{name} has {found}; expected whole numbers", DAMAGED) from error
    size = data.stat().st_size
    if length != wanted:
        raise LoraFxError(
            f"{name} has {length} bytes in {location}; {list(tensor.dims)} needs {wanted}", DAMAGED
        )
    if offset < 0 or offset + wanted > size:
        raise LoraFxError(
            f"{name} lies at bytes {offset} to {offset + wanted} of {location}, which has {size}",
            DAMAGED,
        )


def _data_file(file: Path, name: str, location: str) -> Path:
    """The data file of a tensor, which has to lie in the model's own folder."""
    folder = file.parent.resolve()
    data = file.parent / location
    inside = location and not os.path.isabs(location) and folder in data.resolve().parents
    if not inside:
        raise LoraFxError(
            f"{name} is said to lie in {location!r}, outside the folder of the model",
            "data files lie beside the model; a cache of links has to be copied (cp -rL) first",
        )
    if not data.is_file():
        raise LoraFxError(f"{name} lies in {location}, which is missing", DAMAGED)
    with data.open("rb") as f:
        if f.read(len(LFS)) == LFS:
            raise LoraFxError(f"{data}: a git-lfs pointer, not the data", "git lfs pull")
    if data.stat().st_nlink > 1:
        raise LoraFxError(
            f"{data} has {data.stat().st_nlink} hard links; the onnx package refuses such data",
            "copy the file",
        )
    return data
