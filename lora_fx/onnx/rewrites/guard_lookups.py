"""y → Where(any(ids < first or ids ≥ n), NaN, y), for float outputs y and tables of n rows.

first is 0 for a table that torch's exporter took from an embedding, and −n elsewhere: ONNX counts
negative ids from the end, and so do a table that a torch model indexes and many .onnx files.

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
from lora_fx.onnx.graph.emitter import OnnxEmitter, add_initialiser
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import dtype_name, shape_of
from lora_fx.onnx.row_guards import guard_outputs, is_guard, outputs_without_nan

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
        rows = _rows_of_tables(model)
        if not rows or _has_row_guards(model):
            return ir.passes.PassResult(model, False)
        graph = OnnxGraph(model)
        emitter = graph.emit_first(MARK)
        flags = [_any_outside(graph, emitter, inputs[name], ids) for name, ids in rows.items()]
        outside = flags[0]
        for flag in flags[1:]:
            outside = emitter.call("Or", outside, flag)
        guard_outputs(graph, outside, MARK)
        return ir.passes.PassResult(model, True)


def unguarded_outputs(model: ir.Model) -> list[str]:
    """Return the outputs that cannot hold NaN, and so do not tell an id without a row."""
    if not _rows_of_tables(model) or _has_row_guards(model):
        return []
    return outputs_without_nan(model)


def _has_row_guards(model: ir.Model) -> bool:
    """Whether a model is a file of mode batch; an input of others may have the name of its ids."""
    return any(is_guard(node) for node in model.graph)


def _any_outside(graph: OnnxGraph, emitter: OnnxEmitter, ids: ir.Value, rows: range) -> ir.Value:
    """Emit whether any of the ids is none of the rows', bool [1]."""

    def constant(what: str, value: Array) -> ir.Value:
        name = graph.fresh(f"{MARK}_{what}")
        return add_initialiser(graph.model.graph, name, value, MARK)

    dtype = numpy_dtype(dtype_name(ids))
    below = emitter.call("Less", ids, constant("first", np.array(rows.start, dtype)))
    above = emitter.call("Greater", ids, constant("last", np.array(rows.stop - 1, dtype)))
    outside = emitter.call("Or", below, above)
    flat = emitter.call("Reshape", outside, constant("flat", np.array([-1], np.int64)))
    # floats, which devices have kernels for; and a sum, which is 0 where there are no ids
    counts = emitter.call("Cast", flat, to=int(ir.DataType.FLOAT))
    count = emitter.call("ReduceSum", counts, constant("axes", np.array([0], np.int64)))
    return emitter.call("Greater", count, constant("none", np.array(0, np.float32)))


def _rows_of_tables(model: ir.Model) -> dict[str, range]:
    """Return input → the ids that all tables which its numbers are looked up in have rows for."""
    rows: dict[str, range] = {}
    for node in model.graph:
        if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
            continue
        table, ids = node.inputs
        sizes = shape_of(table)
        name = _input_of(ids)
        if name is not None and sizes and isinstance(sizes[0], int) and len(sizes) > 1:
            first = 0 if _counts_from_zero(node, ids) else -sizes[0]
            known = rows.get(name, range(first, sizes[0]))
            rows[name] = range(max(first, known.start), min(sizes[0], known.stop))
    return rows


def _counts_from_zero(node: ir.Node, ids: ir.Value | None) -> bool:
    """Whether a lookup has no rows for negative ids: an embedding of torch, or unsigned ids."""
    if ids is not None and ids.dtype is not None and not ids.dtype.is_signed():
        return True
    # torch's exporter names a node after the operator that it comes from
    return (node.name or "").startswith("node_embedding")


def _input_of(ids: ir.Value | None) -> str | None:
    """Return the input whose numbers the ids are, all of them; None where there is none."""
    while ids is not None and not ids.is_graph_input():
        node = ids.producer()
        if node is None or node.op_type not in SAME_SET:
            return None
        ids = node.inputs[0]
    return None if ids is None else ids.name
