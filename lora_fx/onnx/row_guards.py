"""Guards of a graph of batch mode: rows whose id is out of range become NaN."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import numpy_dtype
from lora_fx.onnx.graph.flow import MARK, WAS, dtype_name, rank, shape_of
from lora_fx.onnx.graph.graph import OnnxEmitter, OnnxGraph, add_initialiser
from lora_fx.onnx.graph.ops import shares_ranges
from lora_fx.onnx.manifest import IDS

NAN = f"{IDS}_nan"
"""How the names of the constants NaN begin."""
WITH_NAN = ("float16", "bfloat16", "float32", "float64")
"""Dtypes of outputs that can hold NaN and that every runtime's Where takes."""


def outputs_without_nan(model: ir.Model) -> list[str]:
    """The names of outputs whose dtype has no NaN, or none that every runtime's Where takes."""
    outputs = (y for y in model.graph.outputs if not y.is_graph_input())
    return [str(y.name) for y in outputs if dtype_name(y) not in WITH_NAN]


def guard_outputs(graph: OnnxGraph, outside: ir.Value) -> None:
    """Let rows whose id is out of range be NaN in every output of floats.

    Args:
        graph: The graph, whose outputs have their rows on axis 0.
        outside: Which rows those are, bool [batch].
    """
    inner = graph.model.graph
    guards = _Guards(graph, outside)
    # NaN inside of the model would reach a range over all rows, and outputs of integers.
    early = not shares_ranges(graph.model) and not outputs_without_nan(graph.model)

    for i, y in enumerate(inner.outputs):
        if dtype_name(y) not in WITH_NAN or y.is_graph_input():
            continue
        operands = _deciding(y) if early else []
        for node, slot in operands:
            guards.put(node, slot)
        if not operands:
            made = guards.of(OnnxEmitter(graph, inner[-1], IDS, before=False), y)
            y.metadata_props.setdefault(WAS, str(y.name))
            made.name, y.name = y.name, graph.fresh(f"{y.name}_unguarded")
            inner.outputs[i] = made


class _Guards:
    """Makes Where(outside, NaN, y)."""

    def __init__(self, graph: OnnxGraph, outside: ir.Value) -> None:
        self.graph, self.outside = graph, outside
        self._columns: dict[int, ir.Value] = {1: outside}

    def of(self, e: OnnxEmitter, y: ir.Value) -> ir.Value:
        """What e emits: y, NaN in the rows that are outside."""
        stored, dtype = self.graph.model.graph.initializers, dtype_name(y)
        name = f"{NAN}_{dtype}"
        if name not in stored:
            value = np.array(np.nan, numpy_dtype(dtype))
            add_initialiser(self.graph.model.graph, name, value, IDS)
        made = e.call("Where", self._column(e, y), stored[name], y)
        made.shape, made.type = y.shape, y.type
        return made

    def put(self, node: ir.Node, slot: int) -> None:
        """Let a node read its operand so."""
        x = node.inputs[slot]
        assert x is not None
        if not is_guard(x.producer()):
            e = OnnxEmitter(self.graph, node, IDS, before=True)
            node.replace_input_with(slot, self.of(e, x))

    def _column(self, e: OnnxEmitter, y: ir.Value) -> ir.Value:
        """`outside` as [batch, 1, … 1], with as many axes as y has."""
        r = rank(y)
        if r is None:
            sizes = e.call("Shape", y)
            ones = e.call("Cast", e.call("Equal", sizes, sizes), to=int(ir.DataType.INT64))
            tail = e.call("Slice", ones, self._ints(1), self._ints(np.iinfo(np.int64).max))
            shape = e.call("Concat", self._ints(-1), tail, axis=0)
            return e.call("Reshape", self.outside, shape)
        if r not in self._columns:
            first = self.outside.producer()
            assert first is not None
            beside = OnnxEmitter(self.graph, first, IDS, before=False)
            shape = self._ints(-1, *[1] * (r - 1))
            self._columns[r] = beside.call("Reshape", self.outside, shape)
        return self._columns[r]

    def _ints(self, *values: int) -> ir.Value:
        name = self.graph.fresh(f"{IDS}_const")
        return add_initialiser(self.graph.model.graph, name, np.array(values, np.int64), IDS)


def _deciding(y: ir.Value) -> list[tuple[ir.Node, int]]:
    """Operands before y whose NaN makes all of a row of y NaN, where they are smaller than y.

    A Where over all logits took 8 % of a small language model's run, and one over the keys and
    values 20 % of a step of decoding behind 512 positions. So it stands before the product; and
    before the new keys are put behind those that the caller gave, which go out as they came.
    """
    node, sizes = y.producer(), shape_of(y)
    if node is None or node.domain or sizes is None:
        return []
    if node.op_type == "Add":
        parts = (_deciding(v) for v in node.inputs if v is not None and shape_of(v) == sizes)
        return next(filter(None, parts), [])
    if node.op_type == "MatMul":
        x, w = node.inputs
        same = rank(x) == len(sizes) and dtype_name(x) in WITH_NAN
        return [(node, 0)] if same and _widens(w) else []
    if node.op_type == "Concat" and node.attributes["axis"].as_int() % len(sizes):
        brought = [v is not None and v.is_graph_input() for v in node.inputs]
        known = all(rank(v) == len(sizes) for v in node.inputs)
        return [(node, k) for k, b in enumerate(brought) if not b] if known and any(brought) else []
    return []


def is_guarded(y: ir.Value) -> bool:
    """Whether an output is NaN in the rows that are outside."""
    operands = [node.inputs[slot] for node, slot in _deciding(y)]
    return is_guard(y.producer()) or _guarded(operands)


def brings_input(y: ir.Value) -> bool:
    """Whether a part of an output is an input as it came, so that others alone are guarded."""
    node = y.producer()
    return node is not None and node.op_type == "Concat" and is_guarded(y)


def _guarded(values: Sequence[ir.Value | None]) -> bool:
    return bool(values) and all(v is not None and is_guard(v.producer()) for v in values)


def _widens(w: ir.Value | None) -> bool:
    """Whether w is a stored matrix of floats, at least as wide as high, or a transpose of one."""
    turned = w.producer() if w is not None else None
    source = turned.inputs[0] if turned is not None and turned.op_type == "Transpose" else w
    sizes = shape_of(w)
    if source is None or source.const_value is None or sizes is None or len(sizes) != 2:
        return False
    height, width = sizes
    return isinstance(height, int) and isinstance(width, int) and 0 < height <= width


def is_guard(node: ir.Node | None) -> bool:
    """Whether a node makes NaN of rows."""
    if node is None or node.op_type != "Where" or node.metadata_props.get(MARK) != IDS:
        return False
    nan = node.inputs[1]
    return nan is not None and str(nan.name).startswith(NAN)


def guards_alone(model: ir.Model) -> ir.Model:
    """The nodes that make NaN of rows, as a model of the ids and of what these nodes read."""
    guards = [n for n in model.graph if is_guard(n)]
    begins = [IDS, *(str(n.inputs[2].name) for n in guards if n.inputs[2] is not None)]
    ends = [str(n.outputs[0].name) for n in guards]
    graph = ir.convenience.extract(model.graph, [*dict.fromkeys(begins)], ends)
    return ir.Model(graph, ir_version=model.ir_version)
