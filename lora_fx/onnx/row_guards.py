"""Guards of a graph's outputs: what an id out of range would decide becomes NaN."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import numpy_dtype
from lora_fx.ir.einsum import Shape
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.graph.coded_weights import shares_ranges
from lora_fx.onnx.graph.emitter import OnnxEmitter, add_initialiser
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.marks import MARK, WAS
from lora_fx.onnx.graph.values import dtype_name, rank, shape_of

WITH_NAN = ("float16", "bfloat16", "float32", "float64")
"""The output dtypes that can hold NaN and that Where supports in every runtime."""


def outputs_without_nan(model: ir.Model) -> list[str]:
    """Return the outputs whose dtype has no NaN, or is not supported by every runtime's Where."""
    outputs = (y for y in model.graph.outputs if not y.is_graph_input())
    return [str(y.name) for y in outputs if dtype_name(y) not in WITH_NAN]


def guard_outputs(graph: OnnxGraph, outside: ir.Value, mark: str = IDS) -> None:
    """Make rows with an id out of range NaN in every float output.

    Args:
        graph: The graph, whose outputs have their rows on axis 0.
        outside: Which rows those are, bool [batch]; or whether all are, bool [1].
        mark: What the guards are marked with, and how their constants begin.
    """
    owner = graph.model.graph
    guards = _Guards(graph, outside, mark)
    # NaN inside of the model would reach a range over all rows, and outputs of integers.
    early = not shares_ranges(graph.model) and not outputs_without_nan(graph.model)

    for number, y in enumerate(owner.outputs):
        if dtype_name(y) not in WITH_NAN or y.is_graph_input():
            continue
        operands = _deciding_operands(y) if early else []
        for node, slot in operands:
            guards.guard_operand(node, slot)
        if not operands:
            emitter = OnnxEmitter(graph, owner[-1], mark, before=False)
            guarded = guards.guarded(emitter, y)
            y.metadata_props.setdefault(WAS, str(y.name))
            unguarded_name = graph.fresh(f"{y.name}_unguarded")
            guarded.name = y.name
            y.name = unguarded_name
            owner.outputs[number] = guarded


class _Guards:
    """The emitter of guards Where(outside, NaN, y)."""

    def __init__(self, graph: OnnxGraph, outside: ir.Value, mark: str) -> None:
        self.graph = graph
        self.mark = mark
        self.outside = outside
        self._columns: dict[int, ir.Value] = {1: outside}

    def guarded(self, emitter: OnnxEmitter, y: ir.Value) -> ir.Value:
        """Emit the guard of y: y with NaN in the rows that are outside."""
        initialisers = self.graph.model.graph.initializers
        dtype = dtype_name(y)
        name = f"{self.mark}_nan_{dtype}"
        if name not in initialisers:
            nan = np.array(np.nan, numpy_dtype(dtype))
            add_initialiser(self.graph.model.graph, name, nan, self.mark)
        guarded = emitter.call("Where", self._column(emitter, y), initialisers[name], y)
        guarded.shape = y.shape
        guarded.type = y.type
        return guarded

    def guard_operand(self, node: ir.Node, slot: int) -> None:
        """Let a node read the guard of its operand in a slot."""
        x = node.inputs[slot]
        assert x is not None
        if not is_guard(x.producer(), self.mark):
            emitter = OnnxEmitter(self.graph, node, self.mark, before=True)
            node.replace_input_with(slot, self.guarded(emitter, x))

    def _column(self, emitter: OnnxEmitter, y: ir.Value) -> ir.Value:
        """Emit `outside` as [batch, 1, … 1], with as many axes as y has."""
        y_rank = rank(y)
        if y_rank is None:
            return self._column_at_run_time(emitter, y)
        if y_rank not in self._columns:
            first = self.outside.producer()
            assert first is not None
            # Behind `outside`, so that every later node may read it.
            emitter = OnnxEmitter(self.graph, first, self.mark, before=False)
            if y_rank:
                shape = self._ints(-1, *[1] * (y_rank - 1))
                self._columns[y_rank] = emitter.call("Reshape", self.outside, shape)
            else:  # of one number, which no row decides alone
                self._columns[y_rank] = emitter.call("Squeeze", self.outside)
        return self._columns[y_rank]

    def _column_at_run_time(self, emitter: OnnxEmitter, y: ir.Value) -> ir.Value:
        """Emit `outside` as `_column` does, for y with an unknown number of axes."""
        sizes = emitter.call("Shape", y)
        equal = emitter.call("Equal", sizes, sizes)
        unit_sizes = emitter.call("Cast", equal, to=int(ir.DataType.INT64))
        largest = np.iinfo(np.int64).max
        tail = emitter.call("Slice", unit_sizes, self._ints(1), self._ints(largest))
        shape = emitter.call("Concat", self._ints(-1), tail, axis=0)
        return emitter.call("Reshape", self.outside, shape)

    def _ints(self, *values: int) -> ir.Value:
        name = self.graph.fresh(f"{self.mark}_const")
        return add_initialiser(self.graph.model.graph, name, np.array(values, np.int64), self.mark)


def _deciding_operands(y: ir.Value) -> list[tuple[ir.Node, int]]:
    """Return smaller operands before y whose NaN makes the whole row of y NaN.

    A Where over all logits took 8 % of a small language model's run, and one over the keys and
    values 20 % of a step of decoding behind 512 positions. So it stands before the product; and
    before the new keys are put behind those that the caller gave, which go out as they came.

    Returns:
        Each as a node that reads it, and the slot; empty where y itself has to be guarded.
    """
    node = y.producer()
    sizes = shape_of(y)
    if node is None or node.domain or sizes is None:
        return []
    if node.op_type == "Add":
        return _deciding_in_sum(node, sizes)
    if node.op_type == "MatMul":
        return _deciding_in_product(node, len(sizes))
    if node.op_type == "Concat" and node.attributes["axis"].as_int() % len(sizes):
        return _deciding_in_concat(node, len(sizes))
    return []


def _deciding_in_sum(node: ir.Node, sizes: Shape) -> list[tuple[ir.Node, int]]:
    """Return the deciding operands of the first term that has any; terms have the sum's size."""
    for term in node.inputs:
        if term is not None and shape_of(term) == sizes:
            operands = _deciding_operands(term)
            if operands:
                return operands
    return []


def _deciding_in_product(node: ir.Node, y_rank: int) -> list[tuple[ir.Node, int]]:
    """Return the activation, for a product with a weight that makes it wider."""
    x, w = node.inputs
    if rank(x) != y_rank or dtype_name(x) not in WITH_NAN or not _widens(w):
        return []
    return [(node, 0)]


def _deciding_in_concat(node: ir.Node, y_rank: int) -> list[tuple[ir.Node, int]]:
    """Return the values that are concatenated with (unchanged) inputs of the graph."""
    slots = []
    for slot, value in enumerate(node.inputs):
        if rank(value) != y_rank:
            return []
        if value is None or not value.is_graph_input():
            slots.append(slot)
    if len(slots) == len(node.inputs):
        return []
    return [(node, slot) for slot in slots]


def is_guarded(y: ir.Value) -> bool:
    """Whether an output is NaN in the rows that are outside."""
    if is_guard(y.producer()):
        return True
    values = [node.inputs[slot] for node, slot in _deciding_operands(y)]
    if not values:
        return False
    return all(value is not None and is_guard(value.producer()) for value in values)


def brings_input(y: ir.Value) -> bool:
    """Whether part of an output is an unchanged input, so that only the rest is guarded."""
    node = y.producer()
    return node is not None and node.op_type == "Concat" and is_guarded(y)


def _widens(w: ir.Value | None) -> bool:
    """Whether w is a stored float matrix with at least as many columns as rows, or transposed."""
    producer = w.producer() if w is not None else None
    stored = w
    if producer is not None and producer.op_type == "Transpose":
        stored = producer.inputs[0]
    sizes = shape_of(w)
    if stored is None or stored.const_value is None or sizes is None or len(sizes) != 2:
        return False
    height, width = sizes
    return isinstance(height, int) and isinstance(width, int) and 0 < height <= width


def is_guard(node: ir.Node | None, mark: str = IDS) -> bool:
    """Whether a node makes rows NaN."""
    if node is None or node.op_type != "Where" or node.metadata_props.get(MARK) != mark:
        return False
    nan = node.inputs[1]
    return nan is not None and str(nan.name).startswith(f"{mark}_nan")


def guards_alone(model: ir.Model) -> ir.Model:
    """Return a model of only the guard nodes, from the ids and the nodes' inputs."""
    guards = [node for node in model.graph if is_guard(node)]
    guarded_values = [node.inputs[2] for node in guards]
    names = [str(value.name) for value in guarded_values if value is not None]
    begins = dict.fromkeys([IDS, *names])
    ends = [str(node.outputs[0].name) for node in guards]
    graph = ir.convenience.extract(model.graph, [*begins], ends)
    return ir.Model(graph, ir_version=model.ir_version)
