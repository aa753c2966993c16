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
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.graph.emitter import OnnxEmitter, add_initialiser
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.made_for import CPU
from lora_fx.onnx.row_adapters import NAME, RemainingSize, RowAdapters, SharedFactors

SCALES = "adapter_scales"
REFUSED = "over"
"""The constant `adapter_ids_over`: the id that replaces every id out of range, beyond `numbers`."""


def batch_symbol(
    model: ir.Model,
    why: str = "",
    hint: str = "capture with a dynamic batch (--dynamic NAME:0=batch)",
) -> str:
    """Return the symbol of dimension 0 that the inputs share.

    Args:
        model: The model.
        why: Why it may have none, for the error.
        hint: What to do then.

    Raises:
        LoraFxError: No input has a dynamic dimension 0, or they differ.
    """
    symbols = set()
    for value in model.graph.inputs:
        if value.shape and isinstance(value.shape[0], ir.SymbolicDim):
            symbols.add(str(value.shape[0]))
    symbols.discard("None")
    if len(symbols) == 1:
        return symbols.pop()
    listed = ", ".join(sorted(symbols)) or "none"
    if why:
        listed = f"{listed}: {why}"
    raise LoraFxError(
        f"batch mode needs one dynamic dimension 0 that all inputs share; found {listed}", hint
    )


def add_inputs(
    graph: OnnxGraph, batch: str, count: int, *, scales: bool, target: str = CPU
) -> RowAdapters:
    """Add the inputs of batch mode, and the nodes that check the ids.

    Args:
        graph: The graph, edited in place.
        batch: The symbol of the batch dimension.
        count: How many adapters there are, the base among them.
        scales: Add `adapter_scales` float [batch] beside `adapter_ids` int64 [batch].
        target: What the file is made for. Which factors rows share is computed on the CPU alone:
            no device has a kernel for Unique.

    Raises:
        LoraFxError: The model has an input or an initialiser of that name.
    """
    emitter = graph.emit_first(IDS)
    ids = _add_input(graph, IDS, ir.DataType.INT64, batch)
    weights = None
    if scales:
        weights = _add_input(graph, SCALES, ir.DataType.FLOAT, batch)
    zero = _add_constant(graph, "zero", np.array(0, np.int64))
    last = _add_constant(graph, "last", np.array(count - 1, np.int64))
    below = emitter.call("Less", ids, zero)
    outside = emitter.call("Or", below, emitter.call("Greater", ids, last))

    # Gather counts a negative id from the end, so all of them become one that it refuses.
    refused = _add_constant(graph, REFUSED, np.array(count, np.int64))
    refusable = emitter.call("Where", outside, refused, ids)
    numbers = _add_constant(graph, "numbers", np.arange(count))
    gathered = emitter.call("Gather", numbers, refusable)
    checker = gathered.producer()
    assert checker is not None
    checker.name = f"lora_fx: {IDS} out of range, 0 to {count - 1}"  # the runtime's error quotes it
    checked = emitter.call("Where", outside, zero, gathered)
    size = OnnxEmitter(graph, emitter.node, NAME, before=True).call("Shape", checked)
    remaining = RemainingSize(emitter, size)
    shared = None
    if target == CPU:
        shared = SharedFactors(emitter, checked, count, remaining, batch)
    return RowAdapters(checked, count, weights, outside, size, shared, remaining)


def _add_input(graph: OnnxGraph, name: str, dtype: ir.DataType, batch: str) -> ir.Value:
    """Add an input [batch]."""
    owner = graph.model.graph
    if name in owner.initializers or any(value.name == name for value in owner.inputs):
        raise LoraFxError(f"the model has an input {name!r} already", "rename this input")
    value = ir.Value(name=name, shape=ir.Shape([batch]), type=ir.TensorType(dtype))
    owner.inputs.append(value)
    return value


def _add_constant(graph: OnnxGraph, name: str, value: Array) -> ir.Value:
    return add_initialiser(graph.model.graph, f"{IDS}_{name}", value, IDS)
