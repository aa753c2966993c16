"""y → Where(any(ids < 0 or ids ≥ n), NaN, y), for float outputs y and tables of n rows.

What a kernel does with an id that no row has differs: ONNX Runtime's CPU provider raises, but takes
−1 for the last row; OpenVINO 2026.4.1 reads zeros. torch raises for all of them. So the graph says
it where the runtime does not. It does so at the outputs: NaN in place of the row that was looked up
would be lost, since OpenVINO's Relu of NaN is 0 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.graph.emitter import OnnxEmitter, add_initialiser
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import dtype_name, shape_of
from lora_fx.onnx.row_guards import guard_outputs

SAME_SET = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand")
"""Ops whose output has every element of the first input, and no others."""
MARK = "lora_fx_lookup"
"""What the added nodes are marked with, and how their constants begin."""


@dataclass(frozen=True)
class GuardLookups(ir.passes.InPlacePass):
    """A rewrite of graphs whose integer inputs are ids of rows of tables.

    A file of mode batch has guards of its outputs already, for the ids of adapters, and gets no
    others.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        inputs = {str(value.name): value for value in model.graph.inputs}
        rows = {} if IDS in inputs else _rows_of_tables(model)
        if not rows:
            return ir.passes.PassResult(model, False)
        graph = OnnxGraph(model)
        emitter = graph.emit_first(MARK)
        flags = [_any_outside(graph, emitter, inputs[name], count) for name, count in rows.items()]
        outside = flags[0]
        for flag in flags[1:]:
            outside = emitter.call("Or", outside, flag)
        guard_outputs(graph, outside, MARK)
        return ir.passes.PassResult(model, True)


def _any_outside(graph: OnnxGraph, emitter: OnnxEmitter, ids: ir.Value, rows: int) -> ir.Value:
    """Emit whether any of the ids is in no row, bool [1]."""

    def constant(what: str, value: Array) -> ir.Value:
        name = graph.fresh(f"{MARK}_{what}")
        return add_initialiser(graph.model.graph, name, value, MARK)

    dtype = numpy_dtype(dtype_name(ids))
    below = emitter.call("Less", ids, constant("first", np.array(0, dtype)))
    above = emitter.call("Greater", ids, constant("last", np.array(rows - 1, dtype)))
    outside = emitter.call("Or", below, above)
    flat = emitter.call("Reshape", outside, constant("flat", np.array([-1], np.int64)))
    # floats, which devices have kernels for; and a sum, which is 0 where there are no ids
    counts = emitter.call("Cast", flat, to=int(ir.DataType.FLOAT))
    count = emitter.call("ReduceSum", counts, constant("axes", np.array([0], np.int64)))
    return emitter.call("Greater", count, constant("none", np.array(0, np.float32)))


def _rows_of_tables(model: ir.Model) -> dict[str, int]:
    """Return input → the rows of the smallest table that all its numbers are looked up in."""
    rows: dict[str, int] = {}
    for node in model.graph:
        if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
            continue
        table, ids = node.inputs
        sizes = shape_of(table)
        name = _input_of(ids)
        if name is not None and sizes and isinstance(sizes[0], int) and len(sizes) > 1:
            rows[name] = min(sizes[0], rows.get(name, sizes[0]))
    return rows


def _input_of(ids: ir.Value | None) -> str | None:
    """Return the input whose numbers the ids are, all of them; None where there is none."""
    while ids is not None and not ids.is_graph_input():
        node = ids.producer()
        if node is None or node.op_type not in SAME_SET:
            return None
        ids = node.inputs[0]
    return None if ids is None else ids.name
