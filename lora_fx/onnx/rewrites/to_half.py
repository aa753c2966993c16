"""float16 for every node but the islands: weights converted, casts where the two meet.

A value has one cast to the other dtype, however many nodes read it. Inputs and outputs of the
graph stay float32. Bodies of If, Loop and Scan stay as they are, and what they read is cast for
them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_ir as ir

from lora_fx.onnx.graph.flow import bodies_of, is_tensor
from lora_fx.onnx.graph.graph import add_initialiser

KEPT = frozenset({
    "Resize", "Upsample", "NonMaxSuppression", "TopK", "RoiAlign", "Range", "CumSum", "Min", "Max",
    "ConstantOfShape", "Constant", "RandomNormal", "RandomUniform", "RandomNormalLike",
    "RandomUniformLike", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
})  # fmt: skip
"""Ops with operands or kernels that are float32 only, or whose dtype is an attribute."""
MICROSOFT = "com.microsoft"
FULL, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass(frozen=True)
class ToHalf(ir.passes.InPlacePass):
    """Convert a model in place.

    Attributes:
        islands: Names of nodes that stay in float32.
    """

    islands: Collection[str] = ()
    _casts: dict[tuple[int, ir.DataType], ir.Value] = field(default_factory=dict, compare=False)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        graph = model.graph
        nodes = [n for n in graph if self._converts(n)]
        taken = set(nodes)
        mine = {o for n in nodes for o in n.outputs if o.dtype == FULL}
        outputs = {o for o in graph.outputs if o in mine}
        for node in graph.all_nodes():
            to = HALF if node in taken else FULL
            for i, value in enumerate(node.inputs):
                now = HALF if value in mine else None if value is None else value.dtype
                if value is not None and {now, to} == {FULL, HALF}:
                    node.replace_input_with(i, self._as(graph, value, to))
        for node in nodes:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == FULL:
                node.attributes["to"] = ir.AttrInt64("to", int(HALF))
        for value in mine:
            value.type = ir.TensorType(HALF)
        for value in outputs:
            self._end(graph, value)
        return ir.passes.PassResult(model, bool(nodes))

    def _converts(self, node: ir.Node) -> bool:
        """True for a node that computes with floats, and may do so with fewer bits."""
        if node.op_type in KEPT or node.name in self.islands or node.domain not in ("", MICROSOFT):
            return False
        if bodies_of(node):
            return False
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        known = all(v.dtype is not None and is_tensor(v) for v in values)
        return known and any(v.dtype == FULL for v in values)

    def _as(self, graph: ir.Graph, value: ir.Value, to: ir.DataType) -> ir.Value:
        """A value in another dtype: a converted initialiser, or one cast of its own."""
        known = self._casts.get((id(value), to))
        if known is not None:
            return known
        stem = "half" if to == HALF else "full"
        if value.const_value is not None and value.name in graph.initializers:
            array = value.const_value.numpy().astype(to.numpy())
            made = add_initialiser(graph, f"{value.name}_{stem}", array)
            made.metadata_props.update(value.metadata_props)
        else:
            node = ir.node("Cast", [value], {"to": int(to)}, name=f"{value.name}_to_{stem}")
            made = node.outputs[0]
            made.name, made.type = f"{value.name}_{stem}", ir.TensorType(to)
            made.shape = value.shape
            maker = value.producer()
            if maker is None:
                graph[0].prepend(node)
            else:
                maker.append(node)
        self._casts[id(value), to] = made
        return made

    def _end(self, graph: ir.Graph, value: ir.Value) -> None:
        """An output of the graph keeps its name and dtype, and a cast makes it."""
        name, value.name = value.name, f"{value.name}_half"
        full = self._as(graph, value, FULL)
        full.name = name
        graph.outputs[graph.outputs.index(value)] = full
