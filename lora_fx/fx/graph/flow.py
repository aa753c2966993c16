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
from lora_fx.fx.tensors import parameter_of
from lora_fx.ir.view import View

aten = torch.ops.aten
_MADE = "zeros_like ones_like empty_like full_like rand_like randn_like randint_like"
_NEW = "new_zeros new_ones new_empty new_full new_empty_strided"
SHAPE_ONLY = {
    **dict.fromkeys((*_MADE.split(), *_NEW.split()), 0),
    **dict.fromkeys(("type_as", "expand_as", "view_as", "reshape_as", "to"), 1),
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
    given: Mapping[fx.Node, FxWeight] | None = None,
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
        given: Placeholders that are weights, in the body of a higher-order op.
        layers: Such products that are layers; a first walk finds them.
    """
    flow = FxFlow()
    for node, weight in (given or {}).items():
        flow.weights[node], flow.behind[node] = weight, weight.behind
    changed = Writes(graph).ever()
    for node in graph.nodes:
        if node.op == "get_attr":
            name = names.get(str(node.target))
            if name is None:
                flow.constants.add(node)
            elif root is not None:
                shape = tuple(parameter_of(root, name).shape)
                flow.weights[node] = FxWeight(name, View(), shape, node, (name,))
                flow.behind[node] = (name,)
        elif node.op == "call_function" and node not in layers:
            _call(flow, node)
        known = flow.weights.get(node)
        if node in changed and known is not None and known.name:
            flow.weights[node] = replace(known, edited="an in-place edit")
    found = {p for p in flow.products if _is_layer(flow, p)} if not layers else None
    return weight_flow(graph, root, names, given, found) if found else flow


def _is_layer(flow: FxFlow, product: fx.Node) -> bool:
    """True when data is made of a product, and no layer's weight is; bodies count as layers."""
    read = False
    for node in reached([product], lambda n: [u for u in n.users if u in flow.behind]):
        for user in node.users:
            if user in flow.behind:
                continue
            row, read = row_of(user), True
            if not is_marked(user) and (
                isinstance(user.target, HigherOrderOperator)
                or (row is not None and any(pick(user, u.weight) is node for u in row.uses(user)))
            ):
                return False
    return read


def _call(flow: FxFlow, node: fx.Node) -> None:
    if node.target is getattr:  # the device of an input
        flow.constants.add(node)
        return
    inputs = node.all_input_nodes
    found = [i for i in inputs if i in flow.behind]
    if not found:
        if all(i in flow.constants for i in inputs):
            flow.constants.add(node)
        return
    if SHAPE_ONLY.get(op_name(node)) == 0:
        if "rand" not in op_name(node):
            flow.constants.add(node)
        return
    source = flow.weights.get(found[0])
    # W + ΔW of the weight form: the weight is what it adds to
    total = is_marked(node) and node.target is aten.add.Tensor
    if is_marked(node) and not total and "val" not in node.meta:
        return  # a step on the way to ΔW; the copy of a chain behind it has its value's shape
    seen = source if total or source is None else _view(node, found[0], source)
    if seen is not None:
        flow.weights[node], flow.behind[node] = seen, seen.behind
    if seen is not None or total or not all(flow.fixed(i) for i in inputs):
        return
    behind = tuple(sorted({n for i in found for n in flow.behind[i]}))
    constant_product = node.target in PRODUCTS and len(found) == 1 and len(behind) == 1
    if node.target in OPS and node.target not in COMPUTING and not constant_product:
        return
    if constant_product:
        flow.products.append(node)
    flow.behind[node] = behind
    shape = static_shape(shape_of(node))
    if shape is not None:
        edited = next((w.edited for i in found if (w := flow.weights.get(i)) and w.edited), "")
        flow.weights[node] = FxWeight("", View(), shape, node, behind, edited)


def _view(node: fx.Node, source: fx.Node, weight: FxWeight) -> FxWeight | None:
    """The weight that a node is where it only views `source`; None where it does more."""
    if node.target in SPLITS and node.args[0] is source:
        return weight  # the getitem after it slices
    if node.target is DEQUANTISE:
        shape, kind = node.args[4:6]
        return replace(weight, shape=tuple(shape), root=node, format=str(kind))  # type: ignore[arg-type]
    rule = VIEWS.get(node.target)
    if not node.args or node.args[0] is not source:
        return None
    steps = gather(node, weight.shape) if rule is None else rule(node, weight.shape)
    if steps is None:
        return None
    shape = tuple(hint(n) for n in shape_of(node) or weight.shape)
    return replace(weight, view=weight.view.then(*steps), shape=shape)
