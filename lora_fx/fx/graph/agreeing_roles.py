"""What the data flow around a product says of the roles that its weight's name may give it.

A name such as `wv`, `o` or `fc1` is that of any layer. It is a role only where the graph agrees:

    q, k, v   the result enters softmax(q kᵀ) v, or a fused attention
    o         x comes out of one
    router    the result is sorted, or goes through a softmax; or it is narrower than x, activated,
              and multiplied with another layer's, as the gates of all experts are
    gate      the result goes through an activation, and is multiplied with another layer's
    up        the result is multiplied so, or it is wider than x and goes through an activation
    down      x is such a product, or it is wider than the result and activated
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import islice

from torch import fx

from lora_fx.fx.graph import ops
from lora_fx.fx.graph.nodes import is_marked, reached
from lora_fx.fx.graph.roles import FAR, enters_attention, is_product_of_data, is_weighted_sum
from lora_fx.fx.operators import HigherOrderOperator

ACTIVATIONS = frozenset((
    "celu", "elu", "erf", "exp", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "log_sigmoid", "mish", "pow", "prelu", "relu", "relu6", "rrelu", "selu",
    "sigmoid", "silu", "softplus", "tanh",
))  # fmt: skip
CHOICES = frozenset(("argmax", "argsort", "max", "softmax", "sort", "topk"))

CUTS = frozenset(("slice", "select", "narrow"))

AROUND = 30
"""The number of nodes before or after a product in which its activation is searched."""


def agreeing_roles(
    result: fx.Node, inputs: Iterable[fx.Node], *, widens: bool, narrows: bool
) -> frozenset[str] | None:
    """Return the roles that the flow around a product agrees with.

    None if the flow goes through an operator that cannot be looked into.

    Args:
        result: What the rest of the graph reads of the product.
        inputs: The operands that are no weights.
        widens: Whether the weight has more rows than columns.
        narrows: Whether it has fewer.
    """
    after = [*islice(reached(result.users, _onwards), FAR)]
    before = [*islice(reached(inputs, _backwards), FAR)]
    if any(map(_is_opaque, (*after, *before))):
        return None

    roles = set[str]()
    if enters_attention([(user, result) for user in result.users]):
        roles |= {"q", "k", "v"}
    if any(map(is_weighted_sum, before)):
        roles.add("o")
    if any(_op(step) in CHOICES for step in after):
        roles.add("router")

    is_activated = any(_op(step) in ACTIVATIONS for step in after[:AROUND])
    is_multiplied = any(map(_multiplies_layers, after[:AROUND]))
    if is_activated and is_multiplied:
        roles.add("gate")
        if narrows:
            roles.add("router")
    if is_multiplied or (is_activated and widens):
        roles.add("up")
    follows_activation = any(_op(step) in ACTIVATIONS for step in before[:AROUND])
    follows_product = any(map(_multiplies_layers, before[:AROUND]))
    if follows_product or (follows_activation and narrows):
        roles.add("down")
    return frozenset(roles)


def _onwards(node: fx.Node) -> Iterable[fx.Node]:
    """Return the users of a node, none past a product with a weight."""
    return () if _is_layer(node) else node.users


def _backwards(node: fx.Node) -> Iterable[fx.Node]:
    """Return the operands of a node, none past a product with a weight."""
    return () if _is_layer(node) else node.all_input_nodes


def _is_layer(node: fx.Node) -> bool:
    """Whether a node is a product with a weight of the model."""
    return ops.row_of(node) is not None and not is_marked(node) and not is_product_of_data(node)


def _op(node: fx.Node) -> str:
    """Return the name of a node's operator, such as relu for relu.default and relu_.default."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return str(name).rpartition("::")[2].rstrip("_")


def _is_opaque(node: fx.Node) -> bool:
    """Whether a node calls other graphs, or an operator that is none of torch's."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, HigherOrderOperator):
        return True
    namespace = getattr(node.target, "namespace", "aten")
    return namespace not in ("aten", "prim", "prims", "lora_fx") and ops.row_of(node) is None


def _multiplies_layers(node: fx.Node) -> bool:
    """Whether a node multiplies the results of two layers, or two parts of a result, elementwise.

    y · sigmoid(y) is no such product.
    """
    if _op(node) != "mul":
        return False
    sources: list[set[fx.Node]] = []
    for factor in node.args[:2]:
        if not isinstance(factor, fx.Node):
            return False
        steps = [*islice(reached([factor], _backwards_to_cuts), AROUND)]
        sources.append({step for step in steps if _is_layer(step) or _is_cut(step)})
    one, two = sources
    return bool(one - two) and bool(two - one)


def _backwards_to_cuts(node: fx.Node) -> Iterable[fx.Node]:
    """Return the operands of a node, none past a layer or past a part of a result."""
    return () if _is_cut(node) else _backwards(node)


def _is_cut(node: fx.Node) -> bool:
    """Whether a node is a part of a layer's result."""
    if node.target is not operator.getitem and _op(node) not in CUTS:
        return False
    return any(map(_is_layer, islice(reached([node], _backwards), AROUND)))
