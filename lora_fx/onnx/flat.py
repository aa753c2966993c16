"""A layer, its branch and its bias on flat rows, where all that follows reshapes the result.

    Reshape(x W + delta + bias, heads) → Reshape(Gemm(x', W, bias) + delta', heads)

So it is for q, k and v: no fusion takes their bias, and an Add of its own reads and writes every
activation once more. Elsewhere the bias is left to the runtime, which fuses it into what follows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.emitter import add_initialiser
from lora_fx.onnx.flow import MARK
from lora_fx.onnx.graph import OnnxGraph
from lora_fx.onnx.row_rules import rank


class Flat:
    """Nodes before the Add of a branch; flat forms of an activation are made once."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self._rows: dict[tuple[int, int], ir.Value] = {}

    def made(self, add: ir.Node, op: str, *inputs: ir.Value) -> ir.Value:
        """A node of the branch that `add` ends."""
        node = ir.node(op, inputs)
        node.metadata_props[MARK] = add.metadata_props.get(MARK, "")
        node.outputs[0].name = self._graph.fresh(f"lora_flat_{op}")
        assert add.graph is not None
        add.graph.insert_before(add, node)
        return node.outputs[0]

    def rows(self, add: ir.Node, value: ir.Value, width: int) -> ir.Value:
        """[rows, width]; rows are counted from the width, never from a rank, which may be 0."""
        key = (id(add.graph), id(value))
        if key not in self._rows:
            owner, name = self._graph.model.graph, f"lora_rows_of_{width}"
            to = owner.initializers.get(name)
            if to is None:
                to = add_initialiser(owner, name, np.array([-1, width], np.int64), name)
            self._rows[key] = self.made(add, "Reshape", value, to)
        return self._rows[key]

    def layer(self, add: ir.Node, bias: ir.Node, y: ir.Value, left: ir.Value) -> ir.Value:
        """Gemm(left, W, bias) in the place of the product y = x W and of the Add of the bias."""
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

    def heads(self) -> int:
        """Rewrite every branch of that form; returns how many."""
        done = 0
        for add in list(self._graph.model.graph.all_nodes()):
            if add.op_type != "Add" or add.domain or MARK not in add.metadata_props:
                continue
            for y, delta in (add.inputs, add.inputs[::-1]):
                product = y.producer() if y is not None else None
                if product is None or y is None or delta is None or MARK in product.metadata_props:
                    continue
                x, w = product.inputs[0], product.inputs[1] if len(product.inputs) > 1 else None
                bias = reshaped_bias(add, x, y) if x is not None else None
                if bias is None or x is None or w is None or w.shape is None:
                    continue
                width, out = w.shape.numpy()
                whole = self.layer(add, bias, y, self.rows(add, x, int(width)))
                total = self.made(add, "Add", whole, self.rows(add, delta, int(out)))
                total.type = bias.outputs[0].type
                bias.outputs[0].replace_all_uses_with(total)
                assert add.graph is not None
                add.graph.remove((bias, add, product), safe=True)
                done += 1
                break
        self._graph.changed()
        return done


def reshaped_bias(add: ir.Node, x: ir.Value, y: ir.Value) -> ir.Node | None:
    """The Add of a bias after the sum, where all that follows reshapes it, naming every size."""
    product, uses = y.producer(), add.outputs[0].uses()
    if product is None or product.op_type != "MatMul" or product.domain or len(y.uses()) != 1:
        return None
    w, after = product.inputs[1], next(iter(uses)).node if len(uses) == 1 else None
    if (
        product.inputs[0] is not x
        or rank(w) != 2
        or rank(x) is None
        or add.outputs[0].is_graph_output()
    ):
        return None
    if after is None or after.op_type != "Add" or after.domain or after.graph is not add.graph:
        return None
    bias, out = next(v for v in after.inputs if v is not add.outputs[0]), after.outputs[0]
    if bias is None or bias.const_value is None or rank(bias) != 1 or out.is_graph_output():
        return None
    heads = [u.node for u in out.uses()]
    flat = bool(heads) and all(
        n.op_type == "Reshape" and n.inputs[0] is out and _no_zero(n.inputs[1]) for n in heads
    )
    return after if flat else None


def _no_zero(target: ir.Value | None) -> bool:
    """A shape that copies no size from its input: none of its constants is 0."""
    node = target.producer() if target is not None else None
    parts = list(node.inputs) if node is not None and node.op_type == "Concat" else [target]
    known = [ir.convenience.get_const_tensor(v) for v in parts if v is not None]
    if len(parts) == 1 and known[0] is None:
        return False
    return all(t is None or bool((t.numpy() != 0).all()) for t in known)
