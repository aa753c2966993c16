"""The roles that the data flow proves of results: q, k and v of attention, gate and up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph import ops
from lora_fx.fx.graph.nodes import (
    argument,
    aten_ops,
    reached,
    shape_of,
)
from lora_fx.fx.graph.ops import slots
from lora_fx.fx.graph.views import is_view
from lora_fx.ir.einsum import letters

aten = torch.ops.aten

Step = tuple[fx.Node, fx.Node]
"""A node, and the one before it on the way."""

GATES = aten_ops("silu gelu relu sigmoid tanh")
DATA_PRODUCTS = ops.PRODUCTS | aten_ops("baddbmm einsum")


TURNS = aten_ops("transpose.int permute t mT")


FAR = 60
"""Among so many nodes behind a part its role is looked for."""


def roles_of(pieces: Sequence[Sequence[Step]]) -> list[str]:
    """The roles of the parts of a result, each given as the steps that read it."""
    gated = [any(user.target in GATES for user, _ in steps) for steps in pieces]
    if len(pieces) == 2 and sum(gated) == 1:
        return ["gate" if g else "up" for g in gated]
    return [role_of(steps) for steps in pieces]


def role_of(steps: Sequence[Step]) -> str:
    """The role that attention proves of a result: that of every product which it goes into."""
    roles = {_in_attention(node, i) for node, i in _products(steps)}
    return roles.pop() if len(roles) == 1 else ""


def _products(steps: Sequence[Step]) -> Iterator[tuple[fx.Node, int]]:
    """The first products of activations behind some nodes, and which operand leads there."""
    queue, seen = list(steps), set[fx.Node]()
    while queue and len(seen) < FAR:
        node, source = queue.pop(0)
        if node.target in ops.DATA_OPS or (node.target in DATA_PRODUCTS and _is_data(node)):
            first = node.target is aten.baddbmm.default
            yield from ((node, path[-1] - first) for path in slots(node, source))
        elif node not in seen and ops.row_of(node) is None and node.op == "call_function":
            queue += [(u, node) for u in node.users]
        seen.add(node)


def _in_attention(node: fx.Node, operand: int) -> str:
    """What a product uses an operand for: softmax(q kᵀ) v, in any order of the factors."""
    if node.target in ops.DATA_OPS:
        return "qkv"[operand] if operand in (0, 1, 2) else ""
    factors = _factors(node)
    if len(factors) != 2 or operand not in (0, 1):
        return ""
    if _is_softmax(factors[1 - operand]):
        return "v"
    summed = _summed(node)
    return "" if summed is None else "qk"[summed == operand]


def _factors(node: fx.Node) -> Sequence[Any]:
    if node.target is aten.einsum.default:
        return node.args[1]  # type: ignore[return-value]
    return node.args[node.target is aten.baddbmm.default :][:2]


def _is_softmax(value: object) -> bool:
    """Whether a value is a softmax, but for masks, dropout, casts and views."""
    for _ in range(10):
        if not isinstance(value, fx.Node) or value.op != "call_function" or ops.row_of(value):
            return False
        if value.target is aten.softmax.int:
            return True
        value = value.args[0] if value.args else None
    return False


def _summed(node: fx.Node) -> int | None:
    """Which factor has the axis that a softmax of their product sums over: the keys'."""

    def onwards(at: fx.Node) -> list[fx.Node]:
        return [u for u in at.users if ops.row_of(u) is None and u.target not in TURNS]

    near = (user for at in islice(reached([node], onwards), FAR) for user in at.users)
    softmax = next((user for user in near if user.target is aten.softmax.int), None)
    if softmax is None or not any(_products([(u, softmax) for u in softmax.users])):
        return None
    axis = argument(softmax, "dim") % -len(shape_of(softmax) or (0,))
    return _owner(node, axis) if axis in (-1, -2) else None


def _owner(node: fx.Node, axis: int) -> int | None:
    if node.target is not aten.einsum.default:
        return 1 if axis == -1 else 0
    ranks = [len(shape_of(f) or ()) for f in _factors(node)]
    first, second, result = letters(str(node.args[0]).replace(" ", ""), ranks)
    mine = [result[axis] in term for term in (first, second)]
    return mine.index(True) if sum(mine) == 1 else None


def _is_data(node: fx.Node) -> bool:
    """True for a product none of whose operands is read from the model, or a view of that."""

    def stored(value: object) -> bool:
        while isinstance(value, fx.Node) and is_view(value):
            value = value.args[0]
        return isinstance(value, fx.Node) and value.op == "get_attr"

    return not any(stored(f) for f in _factors(node))
