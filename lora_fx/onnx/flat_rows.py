"""A layer, its branch and its bias on flat rows, where all that follows reshapes the result.

    Reshape(x W + delta + bias, heads) → Reshape(Gemm(x', W, bias) + delta', heads)

So it is for q, k and v: no fusion takes their bias, and an Add of its own reads and writes every
activation once more. Elsewhere the bias is left to the runtime, which fuses it into what follows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.flow import MARK, constant, made_by, rank, remove_unread
from lora_fx.onnx.graph.graph import OnnxEmitter, OnnxGraph, add_initialiser


def product_operands(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Both operands of the product that made a value which nothing else reads; else None."""
    node = made_by(value, "MatMul")
    if node is None or len(node.outputs[0].uses()) != 1:
        return None
    left, right = node.inputs
    return None if left is None or right is None else (left, right)


def keep_zeros(graph: OnnxGraph) -> dict[str, int]:
    """Attributes of a Reshape to a computed shape: from opset 14 on, a size of 0 is one."""
    return {"allowzero": 1} if graph.model.opset_imports.get("", 0) >= 14 else {}


class Flat:
    """Makes nodes before the Add of a branch; each activation is flattened once."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self._rows: dict[tuple[int, int], ir.Value] = {}

    def made(self, add: ir.Node, op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """A new node of the branch that `add` ends."""
        mark = add.metadata_props.get(MARK, "")
        return OnnxEmitter(self.graph, add, mark, before=True).call(op, *inputs, **attributes)

    def rows(self, add: ir.Node, value: ir.Value, width: int) -> ir.Value:
        """The value as [rows, width].

        Rows are counted from the width, never from a rank: that may be 0, and 0 rows would follow.
        """
        key = (id(add.graph), id(value))
        if key not in self._rows:
            owner, name = self.graph.model.graph, f"lora_rows_of_{width}"
            to = owner.initializers.get(name)
            if to is None:
                to = add_initialiser(owner, name, np.array([-1, width], np.int64), name)
            self._rows[key] = self.made(add, "Reshape", value, to)
        return self._rows[key]

    def layer(self, add: ir.Node, bias: ir.Node, y: ir.Value, left: ir.Value) -> ir.Value:
        """Put Gemm(left, W, bias) in the place of the product y = x W and the Add of the bias."""
        product, old = y.producer(), add.outputs[0]
        assert product is not None
        w, c = product.inputs[1], next(v for v in bias.inputs if v is not old)
        assert w is not None and c is not None
        whole = self.made(add, "Gemm", left, w, c)
        node = whole.producer()
        assert node is not None
        node.name = product.name
        node.metadata_props.clear()
        node.metadata_props.update(product.metadata_props)
        return whole

    def heads(self) -> None:
        """Rewrite every branch of that form."""
        for add in list(self.graph.model.graph.all_nodes()):
            if add.op_type != "Add" or add.domain or MARK not in add.metadata_props:
                continue
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
                width, out = w.shape.numpy()
                whole = self.layer(add, bias, y, self.rows(add, x, int(width)))
                total = self.made(add, "Add", whole, self.rows(add, delta, int(out)))
                total.type = bias.outputs[0].type
                bias.outputs[0].replace_all_uses_with(total)
                remove_unread(bias)
                break
        self.graph.changed()


def reshaped_bias(add: ir.Node, x: ir.Value | None, y: ir.Value | None) -> ir.Node | None:
    """The Add of a bias after the sum, where all that follows reshapes it, naming every size."""
    left, w = product_operands(y) or (None, None)
    # of codes the runtime knows MatMul alone
    if left is not x or rank(x) is None or rank(w) != 2 or made_by(w, "DequantizeLinear"):
        return None
    total = add.outputs[0]
    readers = [u.node for u in total.uses()]
    after = made_by(readers[0].outputs[0], "Add") if len(readers) == 1 else None
    if after is None or after.graph is not add.graph or total.is_graph_output():
        return None
    bias, out = next(v for v in after.inputs if v is not total), after.outputs[0]
    if bias is None or bias.const_value is None or rank(bias) != 1:
        return None
    heads = [] if out.is_graph_output() else out.consumers()
    flat = heads and all(
        n.op_type == "Reshape" and n.inputs[0] is out and _no_zero(n.inputs[1]) for n in heads
    )
    return after if flat else None


def _no_zero(target: ir.Value | None) -> bool:
    """True for a shape that copies no size from its input: none of its constants is 0."""
    joined = made_by(target, "Concat")
    parts = [target] if joined is None else list(joined.inputs)
    known = [constant(v) for v in parts]
    if len(parts) == 1 and known[0] is None:
        return False
    return all(t is None or bool((t != 0).all()) for t in known)
