"""The roles of results that the data flow proves: q, k and v of attention, gate and up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph import ops
from lora_fx.fx.graph.activations import is_gate
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
"""A node, and the previous node on the way."""

DATA_PRODUCTS = ops.PRODUCTS | aten_ops("baddbmm einsum")


TURNS = aten_ops("transpose.int permute t mT")


FAR = 60
"""The number of nodes after a part in which its role is searched."""


def roles_of(pieces: Sequence[Sequence[Step]]) -> list[str]:
    """Return the roles of the parts of a result.

    Args:
        pieces: For each part, the steps that read it.
    """
    gated = [any(is_gate(user) for user, _ in steps) for steps in pieces]
    if gated == [True, False]:
        return ["gate", "up"]
    if gated == [False, True]:
        return ["up", "gate"]
    return [role_of(steps) for steps in pieces]


def role_of(steps: Sequence[Step]) -> str:
    """Return the role of a result in attention, if all products that it enters agree."""
    roles = {_in_attention(product, operand) for product, operand in _products(steps)}
    if len(roles) != 1:
        return ""
    return roles.pop()


def enters_attention(steps: Sequence[Step]) -> bool:
    """Whether a result enters an attention: before its softmax, or after it."""
    for product, operand in _products(steps):
        if product.target in ops.DATA_OPS or _reaches_softmax(product):
            return True
        factors = _factors(product)
        if any(_is_softmax(factor) for number, factor in enumerate(factors) if number != operand):
            return True
    return False


def _reaches_softmax(node: fx.Node) -> bool:
    """Whether a product of activations goes into a softmax, its axes turned or not."""
    steps = reached([node], lambda step: (u for u in step.users if ops.row_of(u) is None))
    return any(step.target is aten.softmax.int for step in islice(steps, FAR))


def is_weighted_sum(node: fx.Node) -> bool:
    """Whether a node is softmax(…) v, or a fused attention."""
    if node.target in ops.DATA_OPS:
        return True
    return is_product_of_data(node) and any(map(_is_softmax, _factors(node)))


def is_product_of_data(node: fx.Node) -> bool:
    """Whether a node is a product of activations only."""
    return node.target in DATA_PRODUCTS and _is_data(node)


def _products(steps: Sequence[Step]) -> Iterator[tuple[fx.Node, int]]:
    """Yield the first products of activations after some nodes, with the operand's position."""
    queue = list(steps)
    visited = set[fx.Node]()
    while queue and len(visited) < FAR:
        node, source = queue.pop(0)
        if node.target in ops.DATA_OPS or is_product_of_data(node):
            first_factor = 1 if node.target is aten.baddbmm.default else 0
            for path in slots(node, source):
                yield node, path[-1] - first_factor
        elif node not in visited and ops.row_of(node) is None and node.op == "call_function":
            queue += [(user, node) for user in node.users]
        visited.add(node)


def _in_attention(node: fx.Node, operand: int) -> str:
    """Return the role of a product's operand in softmax(q kᵀ) v; the factors have any order."""
    if node.target in ops.DATA_OPS:
        return "qkv"[operand] if operand in (0, 1, 2) else ""
    factors = _factors(node)
    if len(factors) != 2 or operand not in (0, 1):
        return ""
    if _is_softmax(factors[1 - operand]):
        return "v"
    keys = _factor_of_keys(node)
    if keys is None:
        return ""
    return "k" if operand == keys else "q"


def _factors(node: fx.Node) -> Sequence[Any]:
    if node.target is aten.einsum.default:
        return node.args[1]  # type: ignore[return-value]
    if node.target is aten.baddbmm.default:
        return node.args[1:3]
    return node.args[:2]


def _is_softmax(value: object) -> bool:
    """Whether a value is a softmax, apart from masks, dropout, casts and views."""
    for _ in range(10):
        if not isinstance(value, fx.Node) or value.op != "call_function" or ops.row_of(value):
            return False
        if value.target is aten.softmax.int:
            return True
        if not value.args:
            return False
        value = value.args[0]
    return False


def _factor_of_keys(node: fx.Node) -> int | None:
    """Return the position of the keys: the factor with the axis that a softmax sums over."""
    softmax = _softmax_behind(node)
    if softmax is None:
        return None
    feeds_a_product = any(_products([(user, softmax) for user in softmax.users]))
    if not feeds_a_product:
        return None
    axis = argument(softmax, "dim") % -len(shape_of(softmax) or (0,))
    if axis not in (-1, -2):
        return None
    return _factor_with_axis(node, axis)


def _softmax_behind(node: fx.Node) -> fx.Node | None:
    """Return the nearest softmax after a product of activations that keeps the axes in place."""

    def onwards(step: fx.Node) -> list[fx.Node]:
        users = step.users
        return [user for user in users if ops.row_of(user) is None and user.target not in TURNS]

    for step in islice(reached([node], onwards), FAR):
        for user in step.users:
            if user.target is aten.softmax.int:
                return user
    return None


def _factor_with_axis(node: fx.Node, axis: int) -> int | None:
    """Return the factor of a product that has one of the last two axes of the result."""
    if node.target is not aten.einsum.default:
        return 1 if axis == -1 else 0
    ranks = [ops.n_axes(factor) for factor in _factors(node)]
    *terms, result = letters(str(node.args[0]).replace(" ", ""), ranks)
    factors = [factor for factor, term in enumerate(terms) if result[axis] in term]
    if len(factors) != 1:
        return None
    return factors[0]


def _is_data(node: fx.Node) -> bool:
    """True for a product whose operands are all computed, none of them a stored tensor's view."""

    def stored(value: object) -> bool:
        while isinstance(value, fx.Node) and is_view(value):
            value = value.args[0]
        return isinstance(value, fx.Node) and value.op == "get_attr"

    return not any(stored(factor) for factor in _factors(node))
