"""A layer, its branch and its bias on flat rows, for results that are only reshaped.

    Reshape(x W + delta + bias, heads) → Reshape(Gemm(x', W, bias) + delta', heads)

So it is for q, k and v: no fusion takes their bias, and an Add of its own reads and writes every
activation once more. Elsewhere the bias is left to the runtime, which fuses it into what follows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.emitter import EmittingGraph, OnnxEmitter, add_initialiser
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.marks import MARK
from lora_fx.onnx.graph.values import (
    constant,
    delete_unread,
    made_by,
    rank,
    remove_unread,
)
from lora_fx.onnx.unnamed_sizes import TargetEmitter, UnnamedSize, unnamed_size


def product_operands(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Return both operands of the product that made a value with one reader; else None."""
    node = made_by(value, "MatMul")
    if node is None or len(node.outputs[0].uses()) != 1:
        return None
    x, w = node.inputs
    if x is None or w is None:
        return None
    return x, w


def keep_zeros(graph: EmittingGraph) -> dict[str, int]:
    """Return attributes for a Reshape in which a size of 0 means 0, not a copy (opset 14 on)."""
    return {"allowzero": 1} if graph.model.opset_imports.get("", 0) >= 14 else {}


class FlatRows:
    """A builder of nodes before the Add of a branch; it flattens each activation only once."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self._rows: dict[tuple[int, int], ir.Value] = {}
        self._targets: dict[tuple[object, ...], ir.Value] = {}

    def emit(self, add: ir.Node, op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """Emit a new node of the branch that ends in `add`."""
        mark = add.metadata_props.get(MARK, "")
        return OnnxEmitter(self.graph, add, mark, before=True).call(op, *inputs, **attributes)

    def rows(self, add: ir.Node, value: ir.Value, width: int) -> ir.Value:
        """Emit the value as [rows, width].

        Rows are counted from the width, never from a rank: that may be 0, and 0 rows would follow.
        """
        key = (id(add.graph), id(value))
        if key not in self._rows:
            owner = self.graph.model.graph
            name = f"lora_rows_of_{width}"
            shape = owner.initializers.get(name)
            if shape is None:
                shape = add_initialiser(owner, name, np.array([-1, width], np.int64), name)
            self._rows[key] = self.emit(add, "Reshape", value, shape)
        return self._rows[key]

    def biased_layer(self, add: ir.Node, bias: ir.Node, y: ir.Value, x_rows: ir.Value) -> ir.Value:
        """Emit Gemm(x_rows, W, bias) to replace the product y = x W and the Add of the bias.

        Args:
            add: The sum of the product and its branch.
            bias: The Add of the bias, which reads that sum.
            y: The product.
            x_rows: Its activation x on flat rows.
        """
        product = y.producer()
        assert product is not None
        x, w = product.inputs
        b = _other_input(bias, add.outputs[0])
        assert x is not None and w is not None and w.shape is not None and b is not None
        for reshape in tuple(bias.outputs[0].consumers()):
            unnamed = unnamed_size(reshape)
            if unnamed is None:
                continue
            if unnamed.is_known_of(x):
                self._name_size(add, reshape, unnamed, x)
            else:
                self._unflatten(add, reshape, x, int(w.shape.numpy()[1]))
        layer = self.emit(add, "Gemm", x_rows, w, b)
        gemm = layer.producer()
        assert gemm is not None
        gemm.name = product.name
        gemm.metadata_props.clear()
        gemm.metadata_props.update(product.metadata_props)
        return layer

    def _name_size(self, add: ir.Node, reshape: ir.Node, unnamed: UnnamedSize, x: ir.Value) -> None:
        """Write out the −1 beside computed sizes in the target of a Reshape.

        Args:
            add: The sum, before which nodes are emitted.
            reshape: A Reshape of the result.
            unnamed: The −1.
            x: The activation; it has the size where that is no number.
        """
        key = (id(add.graph), unnamed.concat, unnamed.size)
        if key not in self._targets:
            self._targets[key] = self._target_emitter(add).target(unnamed, x)
        reshape.replace_input_with(1, self._targets[key])
        part = unnamed.part
        remove_unread(unnamed.concat)
        delete_unread(part)

    def _unflatten(self, add: ir.Node, reshape: ir.Node, x: ir.Value, width: int) -> None:
        """Let a Reshape whose −1 has no known size read the result in the shape of the layer's.

        Args:
            add: The sum, before which nodes are emitted.
            reshape: A Reshape of the result.
            x: The activation.
            width: The last size of the result; the others are those of x.
        """
        key = (id(add.graph), x, width)
        if key not in self._targets:
            self._targets[key] = self._target_emitter(add).sizes_of_layer(x, width)
        flat = reshape.inputs[0]
        assert flat is not None
        emitter = OnnxEmitter(self.graph, reshape, add.metadata_props.get(MARK, ""), before=True)
        shaped = emitter.call("Reshape", flat, self._targets[key], **keep_zeros(self.graph))
        reshape.replace_input_with(0, shaped)

    def _target_emitter(self, add: ir.Node) -> TargetEmitter:
        return TargetEmitter(self.graph, add, add.metadata_props.get(MARK, ""), before=True)

    def flatten_layers(self) -> None:
        """Rewrite every branch of the form in the module's docstring."""
        for node in list(self.graph.model.graph.all_nodes()):
            if node.op_type == "Add" and not node.domain and MARK in node.metadata_props:
                self._rewrite(node)
        self.graph.changed()

    def _rewrite(self, add: ir.Node) -> None:
        """Rewrite the branch that ends in `add`, if it has that form."""
        for y, delta in (add.inputs, add.inputs[::-1]):
            product = made_by(y, "MatMul")
            if product is None or MARK in product.metadata_props:
                continue
            x, w = product.inputs
            bias = reshaped_bias(add, x, y)
            if bias is None:
                continue
            assert x is not None and y is not None and delta is not None
            assert w is not None and w.shape is not None
            in_size, out_size = w.shape.numpy()
            layer = self.biased_layer(add, bias, y, self.rows(add, x, int(in_size)))
            total = self.emit(add, "Add", layer, self.rows(add, delta, int(out_size)))
            total.type = bias.outputs[0].type
            bias.outputs[0].replace_all_uses_with(total)
            remove_unread(bias)
            return


def reshaped_bias(add: ir.Node, x: ir.Value | None, y: ir.Value | None) -> ir.Node | None:
    """Return the Add of a bias after the sum, if its result is only reshaped to named sizes.

    Args:
        add: The sum of a product and its branch.
        x: The branch's activation.
        y: The product, which is None for other sums.
    """
    operands = product_operands(y)
    if operands is None or operands[0] is not x:
        return None
    _, w = operands
    # of codes the runtime knows MatMul alone
    if rank(x) is None or rank(w) != 2 or made_by(w, "DequantizeLinear"):
        return None

    total = add.outputs[0]
    readers = [use.node for use in total.uses()]
    if len(readers) != 1 or total.is_graph_output():
        return None
    bias_add = made_by(readers[0].outputs[0], "Add")
    if bias_add is None or bias_add.graph is not add.graph:
        return None
    bias = _other_input(bias_add, total)
    if bias is None or bias.const_value is None or rank(bias) != 1:
        return None
    return bias_add if _is_only_reshaped(bias_add.outputs[0]) else None


def _other_input(add: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the other input of an Add."""
    return next(term for term in add.inputs if term is not value)


def _is_only_reshaped(value: ir.Value) -> bool:
    """Whether only Reshapes read a value, and none of them copies a size from it."""
    if value.is_graph_output():
        return False
    readers = value.consumers()
    for node in readers:
        if node.op_type != "Reshape" or node.inputs[0] is not value:
            return False
        if not _names_all_sizes(node.inputs[1]):
            return False
    return bool(readers)


def _names_all_sizes(target: ir.Value | None) -> bool:
    """Whether a shape copies no size from its input: none of its constants is 0."""
    concat = made_by(target, "Concat")
    if concat is None:
        sizes = constant(target)
        return sizes is not None and bool((sizes != 0).all())
    constants = [constant(value) for value in concat.inputs]
    if len(constants) == 1 and constants[0] is None:
        return False
    return all(sizes is None or bool((sizes != 0).all()) for sizes in constants)
