"""Writing of ONNX files: one file, or a file and external data if the weights are large."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.switch import reread

EXTERNAL_OVER = 256 << 20
"""The size of weights in bytes above which they go to `NAME.onnx.data`; protobuf ends at 2 GiB."""

INLINE = 256
"""The size in bytes below which a tensor stays in the file: the runtime needs sizes and axes."""


def weight_bytes(model: ir.Model) -> int:
    """Return the number of bytes of all initialisers."""
    total = 0
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            total += value.const_value.nbytes
    return total


def forget(model: ir.Model) -> None:
    """Empty a model that has been written, whose tensors are in memory beside the file otherwise.

    Nodes and graphs refer to each other, and a graph to the inputs that it had once, weights among
    them: only a collection frees these.
    """
    model.graph = ir.Graph((), (), nodes=())
    gc.collect()


def is_external(path: Path) -> bool:
    """Whether a file keeps tensors in another file."""
    values = ir.load(path).graph.initializers.values()
    return any(isinstance(value.const_value, ir.ExternalTensor) for value in values)


def save(
    model: ir.Model,
    path: Path,
    *,
    external_over: int = EXTERNAL_OVER,
    data: str = "",
    beside: Collection[str] = (),
    delta: bool = False,
) -> list[Path]:
    """Write a model; return the files that were made.

    A data file is called `data`, or `NAME.data` where that is empty. Initialisers named in
    `beside` go there however small they are, since a session can replace only what lies in it. With
    `delta`, tensors that lie in a data file of the same folder stay there.

    Tensors are written one after the other, so that those that are computed on demand are in
    memory one at a time.
    """
    data = data or path.name + ".data"
    if beside or delta:
        return _with_data(model, path, data, beside, delta)
    if weight_bytes(model) <= external_over:
        ir.external_data.load_to_model(model)  # else it would name the data of another file
        ir.save(model, path)
        return [path]
    ir.save(model, path, external_data=data, max_workers=1, max_in_flight_bytes=1 << 26)
    return [path, path.with_name(data)]


def _with_data(
    model: ir.Model, path: Path, data: str, beside: Collection[str], delta: bool
) -> list[Path]:
    """Write a model, and a data file with its tensors.

    1. A tensor of INLINE bytes or more lies there, and so does any that `beside` names: a session
       can replace what lies in a data file, and nothing else.
    2. With `delta`, a tensor that lies in the data file of another model stays there. Without, it
       is read from there and written anew.
    3. Any other tensor lies in the model's file.
    """
    if not delta:
        _load_what_stays_in_the_file(model)
    stored: dict[ir.Value, ir.TensorProtocol] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or (delta and isinstance(tensor, ir.ExternalTensor)):
            continue
        if tensor.nbytes >= INLINE or value.name in beside:
            stored[value] = tensor

    external = ir.external_data.convert_tensors_to_external(
        list(stored.values()), path.parent, data, max_workers=1
    )
    try:
        for value, tensor in zip(stored, external, strict=True):
            value.const_value = tensor
        ir.save(model, path)
    finally:
        for value, tensor in stored.items():
            value.const_value = tensor
    return [path, path.with_name(data)]


def _load_what_stays_in_the_file(model: ir.Model) -> None:
    """Load small external tensors, and those of bodies, which would refer to another data file."""
    for graph in model.graphs():
        is_body = graph is not model.graph
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and (is_body or tensor.nbytes < INLINE):
                value.const_value = ir.tensor(tensor.numpy().copy(), name=tensor.name)


def save_beside(model: ir.Model, path: Path, other: Path) -> int:
    """Write a model that reads tensors from another's data file; return the bytes left.

    A tensor that is stored transposed there is read so, with a Transpose where a reader needs one.

    Args:
        model: The model, edited in place. Tensors that the other file lacks lie in its own file.
        path: Where to write.
        other: A saved file of that folder.
    """
    graph = OnnxGraph(model)
    shared = {_digest(tensor): tensor for _, tensor in _large_tensors(ir.load(other))}
    bytes_left = 0
    for value, tensor in _large_tensors(model):
        equal = shared.get(_digest(tensor))
        if equal is not None:
            value.const_value = equal
            continue
        transposed = shared.get(_digest(tensor, transposed=True))
        if transposed is not None:
            _read_transposed(graph, value, transposed)
        else:
            bytes_left += tensor.nbytes
    ir.save(model, path)
    return bytes_left


def _read_transposed(graph: OnnxGraph, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Replace an initialiser by a Transpose of a stored tensor that holds its transpose."""
    name = str(value.name)
    initialisers = graph.model.graph.initializers
    replacement = ir.val(name, const_value=tensor, metadata_props=dict(value.metadata_props))
    del initialisers[name]
    initialisers[name] = replacement
    reread(graph, value, replacement, (1, 0))


def _large_tensors(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """Return the initialisers that go into a data file, and their tensors."""
    large: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= INLINE:
            large.append((value, tensor))
    return large


def _digest(tensor: ir.TensorProtocol, *, transposed: bool = False) -> tuple[object, ...] | None:
    """Return dtype, shape and hash of a tensor, or of a matrix's transpose, to identify it."""
    array = tensor.numpy()
    if transposed:
        if array.ndim != 2:
            return None
        array = array.T
    data = np.ascontiguousarray(array)
    return str(tensor.dtype), data.shape, hashlib.sha256(data.data).hexdigest()
