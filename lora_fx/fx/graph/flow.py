"""Data flow from parameters: which values of a graph are weights, and through which View.

A weight is a parameter seen through views, or a *computed* weight: what other ops make of
parameters and constants alone (weight_norm, a standardised kernel, a mask times a matrix). The
View of a computed weight starts at the last node that is no view.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from lora_fx.fx.codes import DEQUANTISE
from lora_fx.fx.dotted_names import parameter_of
from lora_fx.fx.graph.in_place import Writes
from lora_fx.fx.graph.nodes import (
    hint,
    is_marked,
    op_name,
    reached,
    shape_of,
)
from lora_fx.fx.graph.ops import COMPUTING, OPS, PRODUCTS, pick, row_of
from lora_fx.fx.graph.views import SPLITS, VIEWS, gather, static_shape
from lora_fx.fx.operators import HigherOrderOperator
from lora_fx.ir.view import View

aten = torch.ops.aten
_LIKE_OPERAND_0 = (
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like "
    "new_zeros new_ones new_empty new_full new_empty_strided"
)
_LIKE_OPERAND_1 = "type_as expand_as view_as reshape_as to"
SHAPE_ONLY = {
    **dict.fromkeys(_LIKE_OPERAND_0.split(), 0),
    **dict.fromkeys(_LIKE_OPERAND_1.split(), 1),
}
"""Ops → the operand whose shape and dtype they read, and no element of it."""


@dataclass(frozen=True)
class FxWeight:
    """A value that is one weight seen through a View.

    Attributes:
        name: The parameter's first name; empty for a computed weight.
        view: The chain from `root` to this value.
        shape: The shape of this value.
        root: The get_attr node, or the node that computes the weight.
        behind: Names of every parameter that it depends on.
        edited: What changes the parameter in place, so that its value is not the stored one.
        format: How it is quantised; empty where it is not.
    """

    name: str
    view: View
    shape: tuple[int, ...]
    root: fx.Node
    behind: tuple[str, ...]
    edited: str = ""
    format: str = ""


@dataclass
class FxFlow:
    """Nodes that depend on parameters and constants only.

    Attributes:
        weights: Nodes that are one tensor derived from parameters.
        behind: The parameters behind every node that depends on some, tensor or not.
        constants: Nodes that depend on constants only.
        products: Products of a constant and one parameter.
    """

    weights: dict[fx.Node, FxWeight] = field(default_factory=dict)
    behind: dict[fx.Node, tuple[str, ...]] = field(default_factory=dict)
    constants: set[fx.Node] = field(default_factory=set)
    products: list[fx.Node] = field(default_factory=list)

    def fixed(self, node: fx.Node) -> bool:
        """True when no input of the call decides the node's value."""
        return node in self.behind or node in self.constants


def weight_flow(
    graph: fx.Graph,
    root: nn.Module | None,
    names: Mapping[str, str],
    placeholders: Mapping[fx.Node, FxWeight] | None = None,
    layers: Collection[fx.Node] = (),
) -> FxFlow:
    """Follow every parameter through a graph.

    What a layer makes is data again, even where both its operands are fixed: the layers after a
    position table are ordinary layers. A product of a constant and one parameter is a computed
    weight where a layer reads it as its weight (a rotation of an orthogonal map), and a layer
    where none does (features of fixed positions).

    Args:
        root: The tree that holds the parameters.
        names: Any name of a parameter → its first name.
        placeholders: Placeholders that are weights, in the body of a higher-order op.
        layers: Such products that are layers; a first walk finds them.
    """
    flow = FxFlow()
    for node, weight in (placeholders or {}).items():
        flow.weights[node] = weight
        flow.behind[node] = weight.behind

    changed_in_place = Writes(graph).ever()
    for node in graph.nodes:
        if node.op == "get_attr":
            _follow_tensor(flow, node, root, names)
        elif node.op == "call_function" and node not in layers:
            _follow_call(flow, node)
        node_weight = flow.weights.get(node)
        if node in changed_in_place and node_weight is not None and node_weight.name:
            flow.weights[node] = replace(node_weight, edited="an in-place edit")

    if not layers:
        layer_products = {product for product in flow.products if _is_layer(flow, product)}
        if layer_products:
            return weight_flow(graph, root, names, placeholders, layer_products)
    return flow


def _is_layer(flow: FxFlow, product: fx.Node) -> bool:
    """True when data is made of a product, and no layer's weight is; bodies count as layers."""

    def fixed_users(node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user in flow.behind]

    makes_data = False
    for node in reached([product], fixed_users):
        for user in node.users:
            if user in flow.behind:
                continue
            if _reads_as_weight(user, node):
                return False
            makes_data = True
    return makes_data


def _reads_as_weight(user: fx.Node, operand: fx.Node) -> bool:
    """Whether a layer, or the body of a higher-order op, may read the operand as its weight."""
    if is_marked(user):
        return False
    if isinstance(user.target, HigherOrderOperator):
        return True
    row = row_of(user)
    return row is not None and any(pick(user, use.weight) is operand for use in row.uses(user))


def _follow_tensor(
    flow: FxFlow, node: fx.Node, root: nn.Module | None, names: Mapping[str, str]
) -> None:
    """Enter the tensor that a get_attr reads: a parameter of the tree, or a constant."""
    name = names.get(str(node.target))
    if name is None:
        flow.constants.add(node)
    elif root is not None:
        shape = tuple(parameter_of(root, name).shape)
        flow.weights[node] = FxWeight(name, View(), shape, node, (name,))
        flow.behind[node] = (name,)


def _follow_call(flow: FxFlow, node: fx.Node) -> None:
    """Enter the result of an op: a constant, a view of a weight, a computed weight, or nothing."""
    if node.target is getattr:  # the device of an input
        flow.constants.add(node)
        return
    inputs = node.all_input_nodes
    from_parameters = [operand for operand in inputs if operand in flow.behind]
    if not from_parameters:
        if all(operand in flow.constants for operand in inputs):
            flow.constants.add(node)
        return
    if SHAPE_ONLY.get(op_name(node)) == 0:
        if "rand" not in op_name(node):
            flow.constants.add(node)
        return

    source = from_parameters[0]
    if is_marked(node):
        if node.target is aten.add.Tensor:
            # W + ΔW of the weight form: the weight is what it adds to
            _enter(flow, node, flow.weights.get(source))
            return
        if "val" not in node.meta:
            return  # a step on the way to ΔW; the copy of a chain behind it has its value's shape

    source_weight = flow.weights.get(source)
    view = None
    if source_weight is not None:
        view = _view(node, source, source_weight)
    if view is not None:
        _enter(flow, node, view)
    elif all(flow.fixed(operand) for operand in inputs):
        _follow_computation(flow, node, from_parameters)


def _enter(flow: FxFlow, node: fx.Node, weight: FxWeight | None) -> None:
    if weight is not None:
        flow.weights[node] = weight
        flow.behind[node] = weight.behind


def _follow_computation(flow: FxFlow, node: fx.Node, from_parameters: list[fx.Node]) -> None:
    """Enter the result of an op on parameters and constants alone, unless the op is a layer."""
    parameters: set[str] = set()
    for operand in from_parameters:
        parameters.update(flow.behind[operand])
    behind = tuple(sorted(parameters))

    is_constant_product = node.target in PRODUCTS and len(from_parameters) == 1 and len(behind) == 1
    if is_constant_product:
        flow.products.append(node)
    elif node.target in OPS and node.target not in COMPUTING:
        return

    flow.behind[node] = behind
    shape = static_shape(shape_of(node))
    if shape is not None:
        operand_weights = [flow.weights.get(operand) for operand in from_parameters]
        edits = [weight.edited for weight in operand_weights if weight and weight.edited]
        edited = edits[0] if edits else ""
        flow.weights[node] = FxWeight("", View(), shape, node, behind, edited)


def _view(node: fx.Node, source: fx.Node, weight: FxWeight) -> FxWeight | None:
    """The weight that a node is where it only views `source`; None where it does more."""
    if node.target in SPLITS and node.args[0] is source:
        return weight  # the getitem after it slices
    if node.target is DEQUANTISE:
        shape, kind = node.args[4:6]
        return replace(weight, shape=tuple(shape), root=node, format=str(kind))  # type: ignore[arg-type]
    if not node.args or node.args[0] is not source:
        return None
    rule = VIEWS.get(node.target, gather)
    steps = rule(node, weight.shape)
    if steps is None:
        return None
    shape = tuple(hint(size) for size in shape_of(node) or weight.shape)
    return replace(weight, view=weight.view.then(*steps), shape=shape)
