"""Conversion to float16 of every node except islands: weights converted, casts in between.

A value has one cast to the other dtype, however many nodes read it. Inputs and outputs of the
graph stay float32. Bodies of If, Loop and Scan stay as they are, and what they read is cast for
them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.emitter import add_initialiser
from lora_fx.onnx.graph.new_names import NewNames
from lora_fx.onnx.graph.values import bodies_of, is_tensor

FLOAT32_ONLY = frozenset({
    "Resize", "Upsample", "NonMaxSuppression", "TopK", "RoiAlign", "Range", "CumSum", "Min", "Max",
    "ConstantOfShape", "Constant", "RandomNormal", "RandomUniform", "RandomNormalLike",
    "RandomUniformLike", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
})  # fmt: skip
"""Ops with operands or kernels only in float32, or whose dtype is an attribute."""
MICROSOFT = "com.microsoft"
FULL = ir.DataType.FLOAT
HALF = ir.DataType.FLOAT16


@dataclass(frozen=True)
class ToHalf(ir.passes.InPlacePass):
    """A rewrite that converts a model to float16 in place.

    Attributes:
        islands: Names of nodes that stay in float32.
    """

    islands: Collection[str] = ()
    _casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(
        default_factory=dict, compare=False
    )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place.

        1. A node reads float16 where it is converted, and float32 where it is not; what it reads in
           the other dtype is cast.
        2. A converted Cast to float32 is one to float16.
        3. The float32 values that converted nodes make are float16.
        4. An output of the graph is float32 as before.
        """
        graph = model.graph
        names = NewNames(model)
        converted = dict.fromkeys(node for node in graph if self._converts(node))
        halved = _float32_outputs(converted)
        halved_outputs = [output for output in graph.outputs if output in halved]

        for node in graph.all_nodes():
            dtype = HALF if node in converted else FULL
            for i, value in enumerate(node.inputs):
                if value is None:
                    continue
                value_dtype = HALF if value in halved else value.dtype
                if {value_dtype, dtype} == {FULL, HALF}:
                    node.replace_input_with(i, self._cast(graph, value, dtype, names))

        for node in converted:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == FULL:
                node.attributes["to"] = ir.AttrInt64("to", int(HALF))
        for value in halved:
            value.type = ir.TensorType(HALF)

        for value in dict.fromkeys(halved_outputs):
            self._restore_output(graph, value, names)
        return ir.passes.PassResult(model, bool(converted))

    def _converts(self, node: ir.Node) -> bool:
        """Whether a node computes with floats and may use float16."""
        if node.op_type in FLOAT32_ONLY or node.name in self.islands:
            return False
        if node.domain not in ("", MICROSOFT) or bodies_of(node):
            return False
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        if any(value.dtype is None or not is_tensor(value) for value in values):
            return False
        return any(value.dtype == FULL for value in values)

    def _cast(
        self, graph: ir.Graph, value: ir.Value, dtype: ir.DataType, names: NewNames
    ) -> ir.Value:
        """Return a value in another dtype: a converted initialiser, or the result of a cast."""
        if (value, dtype) in self._casts:
            return self._casts[value, dtype]

        stem = "half" if dtype == HALF else "full"
        name = names.take(f"{value.name}_{stem}")
        if value.const_value is not None and value.name in graph.initializers:
            # a mask's -3e38 becomes -Inf: where that is wrong, the comparison finds it
            with np.errstate(over="ignore"):
                array = value.const_value.numpy().astype(dtype.numpy())
            cast = add_initialiser(graph, name, array)
            cast.metadata_props.update(value.metadata_props)
        else:
            node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}_to_{stem}")
            cast = node.outputs[0]
            cast.name = name
            cast.type = ir.TensorType(dtype)
            cast.shape = value.shape
            producer = value.producer()
            if producer is None:
                graph[0].prepend(node)
            else:
                producer.append(node)
        self._casts[value, dtype] = cast
        return cast

    def _restore_output(self, graph: ir.Graph, value: ir.Value, names: NewNames) -> None:
        """Restore an output's name and dtype, by a cast of the converted value."""
        name = value.name
        value.name = names.take(f"{name}_half")
        full = self._cast(graph, value, FULL, names)
        full.name = name
        graph.outputs[graph.outputs.index(value)] = full


def _float32_outputs(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    """Return the float32 values that nodes make."""
    values: set[ir.Value] = set()
    for node in nodes:
        values.update(output for output in node.outputs if output.dtype == FULL)
    return values
