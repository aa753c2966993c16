"""Data flow from parameters: which values of a graph are weights, and through which View.

A weight is a parameter seen through views, or a *computed* weight: what other ops make of
parameters and constants alone (weight_norm, a standardised kernel, a mask times a matrix). The
View of a computed weight starts at the last node that is no view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from lora_fx.fx.emitter import is_marked
from lora_fx.fx.nodes import hint, shape_of
from lora_fx.fx.ops import OPS, PRODUCTS, pick, row_of
from lora_fx.fx.tensors import owner
from lora_fx.fx.views import SPLITS, VIEWS, gather
from lora_fx.ir.view import View

aten = torch.ops.aten


@dataclass(frozen=True)
class Weight:
    """A value that is one weight seen through a View.

    Attributes:
        name: The parameter's first name; empty for a computed weight.
        view: The chain from `root` to this value.
        shape: Of this value.
        root: The get_attr node, or the node that computes the weight.
        behind: Names of every parameter that it depends on.
        edited: What changes the parameter in place, so that its value is not the stored one.
    """

    name: str
    view: View
    shape: tuple[int, ...]
    root: fx.Node
    behind: tuple[str, ...]
    edited: str = ""


@dataclass
class Flow:
    """Nodes that depend on parameters and constants only.

    Attributes:
        weights: Those that are one tensor derived from parameters.
        behind: Parameters behind every such node, tensors or not.
        constants: Nodes that depend on constants only.
        products: Those of a constant and one parameter.
    """

    weights: dict[fx.Node, Weight] = field(default_factory=dict)
    behind: dict[fx.Node, tuple[str, ...]] = field(default_factory=dict)
    constants: set[fx.Node] = field(default_factory=set)
    products: list[fx.Node] = field(default_factory=list)

    def fixed(self, node: fx.Node) -> bool:
        """True when no input of the call decides the node's value."""
        return node in self.behind or node in self.constants


def tensor(root: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a dotted name."""
    module, leaf = owner(root, name)
    p = module._parameters[leaf]
    assert p is not None
    return p


def weight_flow(
    graph: fx.Graph,
    root: nn.Module | None,
    names: Mapping[str, str],
    given: Mapping[fx.Node, Weight] | None = None,
) -> Flow:
    """Follow every parameter through a graph.

    What a layer makes is data again, even where both its operands are fixed: the layers after a
    position table are ordinary layers. A product of a constant and one parameter is a computed
    weight where a layer reads it as its weight (a rotation of an orthogonal map), and a layer
    where none does (features of fixed positions).

    Args:
        root: The tree that holds the parameters.
        names: Any name of a parameter → its first name.
        given: Placeholders that are weights, in the body of a higher-order op.
    """
    flow = _follow(graph, root, names, given or {}, set())
    layers = {p for p in flow.products if _is_layer(flow, p)}
    return _follow(graph, root, names, given or {}, layers) if layers else flow


def _follow(
    graph: fx.Graph,
    root: nn.Module | None,
    names: Mapping[str, str],
    given: Mapping[fx.Node, Weight],
    layers: set[fx.Node],
) -> Flow:
    """Everything in one go, with these products as layers."""
    flow = Flow()
    for node, weight in given.items():
        flow.weights[node], flow.behind[node] = weight, weight.behind
    changed = written(graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            name = names.get(str(node.target))
            if name is None:
                flow.constants.add(node)
            elif root is not None:
                shape = tuple(tensor(root, name).shape)
                flow.weights[node] = Weight(name, View(), shape, node, (name,))
                flow.behind[node] = (name,)
        elif node.op == "call_function" and node not in layers:
            _call(flow, node)
        known = flow.weights.get(node)
        if node in changed and known is not None and known.name:
            flow.weights[node] = _edited(known)
    return flow


def _is_layer(flow: Flow, product: fx.Node) -> bool:
    """True when data is made of a product, and no layer's weight is; bodies count as layers."""
    todo, seen, read = [product], {product}, False
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in flow.behind:
                if user not in seen:
                    seen.add(user)
                    todo.append(user)
                continue
            row, read = row_of(user), True
            if not is_marked(user) and (
                isinstance(user.target, torch._ops.HigherOrderOperator)
                or (row is not None and any(pick(user, u.weight) is node for u in row.uses(user)))
            ):
                return False
    return read


def _edited(w: Weight) -> Weight:
    return Weight(w.name, w.view, w.shape, w.root, w.behind, "an in-place edit")


def _call(flow: Flow, node: fx.Node) -> None:
    if node.target is getattr:  # the device of an input
        flow.constants.add(node)
        return
    inputs = node.all_input_nodes
    found = [i for i in inputs if i in flow.behind]
    if not found:
        if all(i in flow.constants for i in inputs):
            flow.constants.add(node)
        return
    source = flow.weights.get(found[0])
    if is_marked(node) and node.target is aten.add.Tensor:
        if source is not None:  # W + ΔW of the weight form: the weight is what it adds to
            flow.weights[node], flow.behind[node] = source, source.behind
        return
    if is_marked(node) and "val" not in node.meta:
        return  # a step on the way to ΔW; the copy of a chain behind it has its value's shape
    if source is not None:
        seen = _view(node, found[0], source)
        if seen is not None:
            flow.weights[node], flow.behind[node] = seen, seen.behind
            return
    if not all(flow.fixed(i) for i in inputs):
        return
    behind = tuple(sorted({n for i in found for n in flow.behind[i]}))
    constant_product = node.target in PRODUCTS and len(found) == 1 and len(behind) == 1
    if node.target in OPS and not constant_product:
        return
    if constant_product:
        flow.products.append(node)
    flow.behind[node] = behind
    shape = shape_of(node)
    if shape is not None and all(isinstance(n, int) for n in shape):
        edited = next((w.edited for i in found if (w := flow.weights.get(i)) and w.edited), "")
        flow.weights[node] = Weight("", View(), shape, node, behind, edited)


def written(graph: fx.Graph) -> set[fx.Node]:
    """Values that an op changes in place, and the values that they are views of."""
    result: set[fx.Node] = set()
    for node in graph.nodes:
        for start in written_by(node):
            value: object = start
            while isinstance(value, fx.Node):
                result.add(value)
                views = value.target in VIEWS and value.target is not aten.clone.default
                value = value.args[0] if views or value.target in SPLITS else None
    return result


def written_by(node: fx.Node) -> list[fx.Node]:
    """The operands that a node changes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    changed = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return [v for name in changed if isinstance(v := given.get(name), fx.Node)]


def _view(node: fx.Node, source: fx.Node, weight: Weight) -> Weight | None:
    """The weight that a node is when it only views `source`."""
    if node.target in SPLITS and node.args[0] is source:
        return weight  # the getitem after it slices
    rule = VIEWS.get(node.target)
    if not node.args or node.args[0] is not source:
        return None
    steps = gather(node, weight.shape) if rule is None else rule(node, weight.shape)
    if steps is None:
        return None
    shape = tuple(hint(n) for n in shape_of(node) or weight.shape)
    return Weight(
        weight.name, weight.view.then(*steps), shape, weight.root, weight.behind, weight.edited
    )


def scope_of(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the innermost module whose forward made the node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "", ""
    path, cls = stack[-1]
    name = cls if isinstance(cls, str) else cls.__name__
    return str(path).split("@")[0], name.rpartition(".")[2]
