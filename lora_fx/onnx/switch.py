"""The factors of a switchable graph, in the place of what insert made.

They are inputs with defaults, or initialisers of a fixed rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.factor_tensors import slot_names
from lora_fx.errors import LoraFxError
from lora_fx.ir.kinds import swap_last
from lora_fx.onnx.graph.emitter import EmittingGraph, OnnxEmitter, add_initialiser
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.marks import MARK
from lora_fx.onnx.graph.values import constant, made_by, rank, remove_unread
from lora_fx.onnx.manifest import SwitchSlot
from lora_fx.targets.target import Target


def settle(graph: OnnxGraph, target: Target, rank: int, symbol: str) -> SwitchSlot:
    """Put A and B, as they are read, in the place of what insert made.

    Args:
        graph: A graph that has the branches of the target.
        target: The target.
        rank: The rank of the default, which is zeros.
        symbol: The name of the rank as a dynamic dimension of inputs; empty where A and B are
            initialisers and no inputs.
    """
    layout = target.layout
    batch = layout.batch_shape
    names = (f"{target.key}.lora_A", f"{target.key}.lora_B")
    free: int | str = symbol or rank
    shapes = ((*batch, layout.in_size, free), (*batch, free, layout.out_size))
    owner = graph.model.graph
    for old, name, shape in zip(slot_names(target.key), names, shapes, strict=True):
        if name in owner.initializers or any(v.name == name for v in owner.inputs):
            raise LoraFxError(f"the graph has a tensor {name!r} already", f"--exclude {target.key}")
        was = owner.initializers[old]
        zeros = np.zeros([n if isinstance(n, int) else rank for n in shape], np.float32)
        new = add_initialiser(owner, name, zeros, was.metadata_props[MARK])
        new.shape = ir.Shape(shape)
        reread(graph, was, new, swap_last(len(batch)))
        del owner.initializers[old]
        if symbol:
            owner.inputs.remove(was)
            owner.inputs.append(new)
    stored = tuple(target.parameter.shape)
    return SwitchSlot(
        *names, layout.in_size, layout.out_size, batch, stored, target.op, target.role, rank
    )


def reread(graph: OnnxGraph, was: ir.Value, new: ir.Value, perm: tuple[int, ...]) -> None:
    """Let users of `was` read `new`, its transpose, with as few transposes as there can be."""
    made = graph.model.graph.initializers
    for user, i in list(was.uses()):
        body = user.graph
        assert body is not None
        if user.op_type == "Mul" and _is_one(one := user.inputs[1 - i]):
            reread(graph, user.outputs[0], new, perm)
            body.remove(user, safe=True)
            if one is not None and not one.uses() and one.name in made:
                del made[str(one.name)]
        elif user.op_type == "Transpose" and tuple(user.attributes["perm"].as_ints()) == perm:
            for reader, j in list(user.outputs[0].uses()):
                reader.replace_input_with(j, new)
            body.remove(user, safe=True)
        elif user.op_type == "Gather" and i == perm[0] == user.attributes.get_int("axis", 0) == 0:
            # matrices that data picks: a transpose behind it would be fused into the product, and
            # ONNX Runtime 1.31 leaves one of rank 0 unwritten
            user.replace_input_with(0, new)
            user.outputs[0].shape = None
            reread(graph, user.outputs[0], user.outputs[0], perm)
        else:
            e = OnnxEmitter(graph, user, user.metadata_props.get(MARK, ""), before=True)
            turned = e.call("Transpose", new, perm=list(perm))
            turned.type = new.type
            user.replace_input_with(i, turned)


def _is_one(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or MARK not in value.metadata_props:
        return False
    return value.const_value.size == 1 and float(value.const_value.numpy().reshape(())) == 1.0


# y + (x A) B → Gemm(x A, B, y) on flat rows, where A and B are inputs of a switchable graph.
#
# The sum is then made inside the product. As an Add of its own it reads and writes every activation
# once more, which costs as much as the products of a small rank, and the same at rank 0. Where the
# result and its bias are only reshaped, all of it stays flat: Gemm(x A, B, Gemm(x, W, bias)).


def accumulate(graph: OnnxGraph, slots: Iterable[SwitchSlot]) -> None:
    """Rewrite every branch of that form; branches with casts or stacks in them stay as they are."""
    flat = Flat(graph)
    pairs = {(s.a, s.b): s for s in slots if not s.batch}
    for node in list(graph.model.graph.all_nodes()):
        match = _match(node)
        slot = pairs.get((str(match[1].name), str(match[2].name))) if match else None
        if match and slot and not _beside_codes(node, match[0]):
            _rewrite(node, match, slot, flat)
    graph.changed()


Match = tuple[ir.Value, ir.Value, ir.Value, ir.Value]


def _match(node: ir.Node) -> Match | None:
    """The values x, A, B and y of Add(y, MatMul(MatMul(x, A), B)); None for other nodes."""
    if node.op_type != "Add" or node.domain:
        return None
    for y, delta in (node.inputs, node.inputs[::-1]):
        outer = _product(delta)
        inner = _product(outer[0]) if outer else None
        if outer and inner and y is not None and rank(y) == rank(inner[0]) and rank(y):
            return (*inner, outer[1], y)
    return None


def _beside_codes(add: ir.Node, x: ir.Value) -> bool:
    """True where a Reshape would stand at codes of activations.

    ONNX Runtime 1.31 moves QuantizeLinear over it, with a zero point of another dtype than the
    scale's own codes, and then refuses the graph.
    """
    readers = (u.node.op_type for u in add.outputs[0].uses())
    return made_by(x, "DequantizeLinear") is not None or "QuantizeLinear" in readers


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Both operands of the product that made a value which nothing else reads; else None."""
    node = made_by(value, "MatMul")
    if node is None or len(node.outputs[0].uses()) != 1:
        return None
    left, right = node.inputs
    return None if left is None or right is None else (left, right)


def _rewrite(add: ir.Node, match: Match, slot: SwitchSlot, flat: Flat) -> None:
    """Make one product of the sum, or of the sum and its bias; a graph's output keeps its name."""
    x, a, b, y = match
    plain = rank(y) == 2
    left = x if plain else flat.rows(add, x, slot.inside)
    t = flat.made(add, "MatMul", left, a)
    old, bias = add.outputs[0], None if plain else reshaped_bias(add, x, y)
    if bias is not None:
        total, old = flat.made(add, "Gemm", t, b, flat.layer(add, bias, y, left)), bias.outputs[0]
    else:
        total = flat.made(add, "Gemm", t, b, y if plain else flat.rows(add, y, slot.out))
        if not plain:
            shape = flat.made(add, "Shape", y)
            total = flat.made(add, "Reshape", total, shape, **keep_zeros(flat.graph))
        total.shape = old.shape
    total.type = old.type
    old.replace_all_uses_with(total, replace_graph_outputs=True)
    if total.is_graph_output():
        total.name, old.name = old.name, total.name
    remove_unread(old.producer())


# A layer, its branch and its bias on flat rows, where all that follows reshapes the result.
#
#     Reshape(x W + delta + bias, heads) → Reshape(Gemm(x', W, bias) + delta', heads)
#
# So it is for q, k and v: no fusion takes their bias, and an Add of its own reads and writes every
# activation once more. Elsewhere the bias is left to the runtime, which fuses it into what follows.


def keep_zeros(graph: EmittingGraph) -> dict[str, int]:
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
    left, w = _product(y) or (None, None)
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
