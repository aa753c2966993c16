"""The inputs that batch mode adds to an ONNX graph: the adapter of each row, and its weight.

An id out of range is a number of the caller's, and what a kernel does with one differs: the CPU's
Gather fails, CUDA's reads zeros, WebGPU's and DirectML's the last adapter. So the ids are checked
once, before anything reads them:

    outside = ids < 0 or ids > n
    i       = 0 where outside, else numbers[ids]      numbers = 0, 1 … n
    y       = NaN where outside, else y               for every output y of floats

A Gather in `numbers` fails where a runtime refuses. Elsewhere such a row is the base's until it
becomes NaN, so that no factor of another adapter is ever read for it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.onnx.graph.graph import OnnxGraph, add_initialiser
from lora_fx.onnx.manifest import IDS
from lora_fx.onnx.row_adapters import RowAdapters

SCALES = "adapter_scales"
REFUSED = "over"
"""The constant `adapter_ids_over`, that every id out of range becomes; `numbers` ends before it."""


def batch_symbol(
    model: ir.Model,
    why: str = "",
    hint: str = "capture with a dynamic batch (--dynamic NAME:0=batch)",
) -> str:
    """The symbol of dimension 0 that the inputs share.

    Args:
        model: The model.
        why: Why it may have none, for the error.
        hint: What to do then.

    Raises:
        LoraFxError: No input has a dynamic dimension 0, or they differ.
    """
    found = {
        str(v.shape[0])
        for v in model.graph.inputs
        if v.shape is not None and len(v.shape) and isinstance(v.shape[0], ir.SymbolicDim)
    } - {"None"}
    if len(found) != 1:
        had = ", ".join(sorted(found)) or "none"
        had = f"{had}: {why}" if why else had
        raise LoraFxError(
            f"batch mode needs one dynamic dimension 0 over the inputs; found {had}", hint
        )
    return found.pop()


def add_inputs(graph: OnnxGraph, batch: str, count: int, *, scales: bool) -> RowAdapters:
    """Add `adapter_ids` int64 [batch], and with `scales` also `adapter_scales` float [batch]."""
    inner = graph.model.graph
    taken = {v.name for v in inner.inputs} | set(inner.initializers)

    def added(name: str, dtype: ir.DataType) -> ir.Value:
        if name in taken:
            raise LoraFxError(f"the model has an input {name!r} already", "rename it")
        value = ir.Value(name=name, shape=ir.Shape([batch]), type=ir.TensorType(dtype))
        inner.inputs.append(value)
        return value

    def constant(name: str, value: Array) -> ir.Value:
        return add_initialiser(inner, f"{IDS}_{name}", value, IDS)

    e = graph.emit_first(IDS)
    raw = added(IDS, ir.DataType.INT64)
    weights = added(SCALES, ir.DataType.FLOAT) if scales else None
    zero = constant("zero", np.array(0, np.int64))
    last = constant("last", np.array(count - 1, np.int64))
    outside = e.call("Or", e.call("Less", raw, zero), e.call("Greater", raw, last))

    # Gather counts a negative id from the end, so all of them become one that it refuses.
    refused = e.call("Where", outside, constant(REFUSED, np.array(count, np.int64)), raw)
    seen = e.call("Gather", constant("numbers", np.arange(count)), refused)
    checker = seen.producer()
    assert checker is not None
    checker.name = f"lora_fx: {IDS} out of range, 0 to {count - 1}"  # the runtime's error quotes it
    checked = e.call("Where", outside, zero, seen)
    return RowAdapters(e, checked, count, weights, batch, outside)
