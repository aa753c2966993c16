"""Writing ONNX files: one file, or external data beside it when the weights are large."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.switch import reread

EXTERNAL_OVER = 256 << 20
"""With more bytes of weights than this they go to `NAME.onnx.data`; protobuf ends at 2 GiB."""

INLINE = 256
"""A tensor of fewer bytes stays in the file: sizes and axes, which the runtime wants to read."""


def weight_bytes(model: ir.Model) -> int:
    """How many bytes all initialisers have."""
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def is_external(path: Path) -> bool:
    """True when a file keeps tensors in another file."""
    values = ir.load(path).graph.initializers.values()
    return any(isinstance(v.const_value, ir.ExternalTensor) for v in values)


def save(
    model: ir.Model,
    path: Path,
    *,
    external_over: int = EXTERNAL_OVER,
    data: str = "",
    beside: Collection[str] = (),
    delta: bool = False,
) -> list[Path]:
    """Write a model; returns the files that were made.

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
    for graph in () if delta else model.graphs():  # else they would name the data of another file
        for v in graph.initializers.values():
            held, body = v.const_value, graph is not model.graph
            if isinstance(held, ir.ExternalTensor) and (body or held.nbytes < INLINE):
                v.const_value = ir.tensor(held.numpy().copy(), name=held.name)
    # what a session replaces has to lie beside the file, however small it is
    kept = {
        v: held
        for v in model.graph.initializers.values()
        if (held := v.const_value) is not None
        and (held.nbytes >= INLINE or v.name in beside)
        and not (delta and isinstance(held, ir.ExternalTensor))
    }
    moved = ir.external_data.convert_tensors_to_external(
        list(kept.values()), path.parent, data, max_workers=1
    )
    try:
        for value, tensor in zip(kept, moved, strict=True):
            value.const_value = tensor
        ir.save(model, path)
    finally:
        for value, was in kept.items():
            value.const_value = was
    return [path, path.with_name(data)]


def save_beside(model: ir.Model, path: Path, other: Path) -> int:
    """Write a model that reads the tensors in the data file of another; returns the bytes left.

    A tensor that is stored transposed there is read so, with a Transpose where a reader needs one.

    Args:
        model: The model, edited in place. Its tensors that are not found lie in its own file.
        path: Where to write.
        other: A saved file of that folder.
    """
    graph = OnnxGraph(model)
    known = {_digest(t): t for _, t in _large(ir.load(other))}
    left = 0
    for value, held in _large(model):
        same = known.get(_digest(held))
        turned = known.get(_digest(held, turned=True)) if same is None else None
        if turned is not None:
            name, marked = str(value.name), dict(value.metadata_props)
            new = ir.val(name, const_value=turned, metadata_props=marked)
            del model.graph.initializers[name]
            model.graph.initializers[name] = new
            reread(graph, value, new, (1, 0))
        elif same is not None:
            value.const_value = same
        else:
            left += held.nbytes
    ir.save(model, path)
    return left


def _large(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """The initialisers that lie in a data file, and their tensors."""
    stored = ((v, v.const_value) for v in model.graph.initializers.values())
    return [(v, t) for v, t in stored if t is not None and t.nbytes >= INLINE]


def _digest(tensor: ir.TensorProtocol, *, turned: bool = False) -> tuple[object, ...] | None:
    """What tells a tensor from others: its dtype, shape and bytes; of a matrix its transpose's."""
    array = tensor.numpy()
    if turned:
        if array.ndim != 2:
            return None
        array = array.T
    data = np.ascontiguousarray(array)
    return str(tensor.dtype), data.shape, hashlib.sha256(data.data).hexdigest()
