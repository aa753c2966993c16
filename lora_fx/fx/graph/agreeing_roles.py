"""What the data flow around a product says of the roles that its weight's name may give it.

A name such as `wv`, `o` or `fc1` is that of any layer. It is a role only where the graph agrees:

    q, k, v   the result enters softmax(q kᵀ) v, or a fused attention
    o         x comes out of one
    router    the result is sorted, or goes through a softmax; or it is narrower than x, activated,
              and multiplied with another layer's, as the gates of all experts are
    gate      the result goes through an activation, and is multiplied with another layer's
    up        the result is multiplied so, or it is wider than x and goes through an activation
    down      x is such a product, or it is wider than the result and activated

A hidden width that is no wider tells up from down by the order instead, where the two are a block:
up, activation and down, whose result is added to what the block reads. A bottleneck that scales the
channels of x (squeeze and excitation) is no such block, and its layers have no role.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import islice

from torch import fx

from lora_fx.fx.graph import ops
from lora_fx.fx.graph.activations import is_activation
from lora_fx.fx.graph.nodes import hint, is_marked, op_in_any_form, reached, shape_of
from lora_fx.fx.graph.roles import FAR, enters_attention, is_product_of_data, is_weighted_sum
from lora_fx.fx.operators import HigherOrderOperator
from lora_fx.ir.convolution import DEPTHWISE

CHOICES = frozenset(("argmax", "argsort", "max", "softmax", "sort", "topk"))

CUTS = frozenset(("slice", "select", "narrow"))

AROUND = 30
"""The number of nodes before or after a product in which its activation is searched."""


def agreeing_roles(
    result: fx.Node, inputs: Sequence[fx.Node], *, widens: bool, narrows: bool
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
    if any(op_in_any_form(step) in CHOICES for step in after):
        roles.add("router")

    is_activated = any(is_activation(step) for step in after[:AROUND])
    is_multiplied = any(map(_multiplies_layers, after[:AROUND]))
    if is_activated and is_multiplied:
        roles.add("gate")
        if narrows:
            roles.add("router")
    if is_multiplied or (is_activated and (widens or _opens_block(after, inputs))):
        roles.add("up")
    follows_activation = any(is_activation(step) for step in before[:AROUND])
    follows_product = any(map(_multiplies_layers, before[:AROUND]))
    if follows_product or (follows_activation and (narrows or _closes_block(before, result))):
        roles.add("down")
    return frozenset(roles)


def _opens_block(after: Iterable[fx.Node], inputs: Sequence[fx.Node]) -> bool:
    """Whether the layers after a product are added to what the product reads."""
    next_layers = [*filter(_is_layer, after)]
    return bool(next_layers) and all(_is_added_to(layer, inputs) for layer in next_layers)


def _closes_block(before: Iterable[fx.Node], result: fx.Node) -> bool:
    """Whether a result is added to what the layers before the product read."""
    previous_layers = [*filter(_is_layer, before)]
    added = (_is_added_to(result, layer.all_input_nodes) for layer in previous_layers)
    return bool(previous_layers) and all(added)


def _is_added_to(result: fx.Node, inputs: Iterable[fx.Node]) -> bool:
    """Whether a result is added to one of the values that these inputs are made of.

    On the way it may be turned, dropped, scaled or added to others, but not activated, and not
    multiplied with another layer's result.
    """
    sources = {*islice(reached(inputs, _backwards), AROUND)}
    sums = [*islice(reached([result], _users_in_a_sum), AROUND)]
    for step in sums:
        if op_in_any_form(step) != "add" or not _have_one_shape(step.all_input_nodes):
            continue
        if any(term in sources and term not in sums for term in step.all_input_nodes):
            return True
    return False


def _have_one_shape(nodes: Iterable[fx.Node]) -> bool:
    """Whether all nodes have the same shape, so that a sum of them repeats none."""
    return len({tuple(map(hint, shape_of(node) or ())) for node in nodes}) == 1


def _users_in_a_sum(node: fx.Node) -> Iterable[fx.Node]:
    """Return the users of a result in which it is still a term of a sum."""
    for user in node.users:
        op = op_in_any_form(user)
        is_term = not (_is_layer(user) or is_activation(user) or op in CHOICES)
        if is_term and not is_product_of_data(user) and not _multiplies_layers(user):
            yield user


def _onwards(node: fx.Node) -> Iterable[fx.Node]:
    """Return the users of a node, none past a product with a weight."""
    return () if _is_layer(node) else node.users


def _backwards(node: fx.Node) -> Iterable[fx.Node]:
    """Return the operands of a node, none past a product with a weight."""
    return () if _is_layer(node) else node.all_input_nodes


def _is_layer(node: fx.Node) -> bool:
    """Whether a node is a product with a weight of the model that mixes channels."""
    row = ops.row_of(node)
    if row is None or is_marked(node) or is_product_of_data(node):
        return False
    return all(operand.refusal != DEPTHWISE for operand in row.uses(node))


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
    if op_in_any_form(node) != "mul":
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
    if node.target is not operator.getitem and op_in_any_form(node) not in CUTS:
        return False
    return any(map(_is_layer, islice(reached([node], _backwards), AROUND)))
