"""Data flow from parameters: which values of a graph are weights, and through which View.

A weight is a parameter seen through views, or a *computed* weight: what other ops make of
parameters and constants alone (weight_norm, a standardised kernel, a mask times a matrix). The
View of a computed weight starts at the last node that is no view.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from lora_fx.fx.codes import DEQUANTISE
from lora_fx.fx.graph.nodes import (
    argument,
    aten_ops,
    dtype_name,
    hint,
    is_marked,
    numel,
    op_name,
    plain,
    reached,
    shape_of,
    value,
)
from lora_fx.fx.graph.ops import COMPUTING, OPS, PRODUCTS, pick, row_of
from lora_fx.fx.operators import HigherOrderOperator
from lora_fx.fx.tensors import device_of, owner, parameter_of
from lora_fx.ir.einsum import Shape
from lora_fx.ir.view import Cast, Gather, Permute, Reshape, Slice, Step, View

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
    shape = _static(shape_of(node))
    if shape is not None:
        edited = next((w.edited for i in found if (w := flow.weights.get(i)) and w.edited), "")
        flow.weights[node] = FxWeight("", View(), shape, node, behind, edited)


Storage = frozenset["fx.Node | str"]
_MAY_ALIAS = aten_ops("dropout type_as feature_dropout")
"""Ops whose schema says nothing, and whose result can be their first operand itself."""


class Writes:
    """What a graph's ops change in place: which storage, and when.

    A storage is known by the nodes that made it, a tensor of the tree by its name. A result lies in
    the storage of an operand where the op's schema says that it may.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order: dict[fx.Node, int] = {}
        self.storage: dict[fx.Node, Storage] = {}
        self.writes: list[tuple[int, Storage]] = []
        for i, node in enumerate(graph.nodes):
            self.order[node] = i
            self.storage[node] = self._of(node)
            self.writes += [(i, self.storage[v]) for v in written_by(node)]

    def _of(self, node: fx.Node) -> Storage:
        if node.op == "get_attr":
            return frozenset((str(node.target),))
        held = aliased_by(node)
        if node.target is operator.getitem:
            held = node.all_input_nodes
            several = getattr(getattr(held[0].target, "_schema", None), "returns", ())
            if len(several) > 1 and all(r.alias_info is None for r in several):
                # results of their own, as the values and the places of a topk are
                return frozenset((next(u for u in held[0].users if u.args[1] == node.args[1]),))
        return frozenset().union(*(self.storage[v] for v in held)) or frozenset((node,))

    def between(self, value: fx.Node, start: fx.Node, end: fx.Node | None = None) -> bool:
        """Whether something writes to a value's storage after one node and before another."""
        last = len(self.order) if end is None else self.order[end]
        own = self.storage[value]
        return any(self.order[start] < i < last and own & s for i, s in self.writes)

    def ever(self) -> set[fx.Node]:
        """Values that some op changes in place, and all that lies in the same storage."""
        changed = frozenset().union(*(s for _, s in self.writes))
        return {n for n, s in self.storage.items() if s & changed} if changed else set()


def aliased_by(node: fx.Node) -> list[fx.Node]:
    """The operands in whose storage a node's result may lie."""
    if node.target in _MAY_ALIAS:
        return [v for v in node.args[:1] if isinstance(v, fx.Node)]
    if node.op != "call_function" or not _may_alias(node.target):
        return []
    return [v for _, v in _annotated(node)]


def written_by(node: fx.Node) -> list[fx.Node]:
    """The operands that a node changes in place."""
    return [v for info, v in _annotated(node) if info.is_write]


def _annotated(node: fx.Node) -> list[tuple[Any, fx.Node]]:
    """(what the op's schema says, operand) of operands that a result lies in or that change."""
    if node.op != "call_function":
        return []
    said = [
        (info, node.args[i] if i < len(node.args) else node.kwargs.get(name))
        for i, name, info in _annotations(node.target)
    ]
    return [(info, v) for info, v in said if isinstance(v, fx.Node)]


@functools.lru_cache(1024)
def _annotations(target: Any) -> tuple[tuple[int, str, Any], ...]:
    """(place, name, what is said) of the arguments of an op of whose storage its schema speaks."""
    arguments = getattr(getattr(target, "_schema", None), "arguments", ())
    return tuple((i, a.name, a.alias_info) for i, a in enumerate(arguments) if a.alias_info)


@functools.lru_cache(1024)
def _may_alias(target: Any) -> bool:
    """Whether an op's schema says that its result may lie in the storage of an operand."""
    returns = getattr(getattr(target, "_schema", None), "returns", ())
    return any(r.alias_info for r in returns)


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


def _static(shape: Shape | None) -> tuple[int, ...] | None:
    return shape if shape is not None and all(isinstance(n, int) for n in shape) else None


Rule = Callable[[Node, tuple[int, ...]], list[Step] | None]
"""The steps of a view from its node and the shape of what it views; None where it is no view."""


def _permute(dims: Callable[[Node, int], tuple[int, ...]]) -> Rule:
    def steps(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
        n = len(shape)
        return [Permute(tuple(d % n for d in dims(node, n)))]

    return steps


def _swapped(node: Node, n: int) -> tuple[int, ...]:
    order = list(range(n))
    i, j = int(argument(node, "dim0")) % n, int(argument(node, "dim1")) % n
    order[i], order[j] = order[j], order[i]
    return tuple(order)


def _reshape(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    # an expand that repeats is no view of the weight: each element is read several times
    out = _static(shape_of(node))
    return [Reshape(out)] if out is not None and numel(out) == numel(shape) else None


def _cast(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    before, after = value(node.args[0]), value(node)
    return [] if before.dtype == after.dtype else [Cast(dtype_name(after.dtype))]


def _slice(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    axis = int(argument(node, "dim", 0)) % len(shape)
    out, start, step = _static(shape_of(node)), argument(node, "start"), argument(node, "step", 1)
    if out is None or step != 1 or not isinstance(start, int | None):
        return None
    first = slice(start, None).indices(shape[axis])[0]
    return [Slice(axis, first, first + out[axis])]


def _select(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    i = argument(node, "index")
    return _one(node, shape, i) if isinstance(i, int) else None  # another one is computed


def _one(node: Node, shape: tuple[int, ...], i: int) -> list[Step]:
    """The steps to one place along the op's axis, which goes."""
    axis = int(argument(node, "dim", 0)) % len(shape)
    i %= shape[axis]
    return [Slice(axis, i, i + 1), Reshape(shape[:axis] + shape[axis + 1 :])]


def _item(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    """A part of a split, chunk or unbind: the slice behind the sizes of the parts before it."""
    parent, i = node.args
    if not isinstance(parent, Node) or not isinstance(i, int):
        return None
    if parent.target is aten.unbind.int:
        return _one(parent, shape, i)
    axis = int(argument(parent, "dim", 0)) % len(shape)
    sizes = [int(v.shape[axis]) for v in value(parent)]
    i %= len(sizes)
    start = sum(sizes[:i])
    return [Slice(axis, start, start + sizes[i])]


def gather(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    """A choice along the first axis by data, as a router makes it among stacked matrices.

    Without it, the experts of a mixture in batched form are no weights and go unreached.
    """
    one = node.target is aten.index_select.default and int(argument(node, "dim")) == 0
    if node.target is aten.index.Tensor:
        ids = node.args[1]
        lone = isinstance(ids, (tuple, list)) and len(ids) == 1 and isinstance(ids[0], Node)
        one = lone and len(shape_of(ids[0]) or ()) == 1  # type: ignore[index]
    return [Gather(0)] if one and len(shape) > 2 else None


SPLITS = aten_ops(
    "split.Tensor split.sizes split_with_sizes chunk unbind.int tensor_split.sections"
)
_reversed = _permute(lambda node, n: tuple(range(n))[::-1])
_last_two = _permute(lambda node, n: (*range(n - 2), n - 1, n - 2))


def _adjoint(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    # conjugated, it is another tensor
    return None if value(node).is_complex() else _last_two(node, shape)


_RESHAPES = aten_ops(
    "view reshape _unsafe_view flatten.using_ints unflatten.int squeeze squeeze.dim squeeze.dims "
    "unsqueeze expand"
)
VIEWS: Mapping[object, Rule] = {
    **dict.fromkeys(aten_ops("t numpy_T"), _reversed),
    aten.mT.default: _last_two,
    **dict.fromkeys(aten_ops("adjoint matrix_H"), _adjoint),
    aten.transpose.int: _permute(_swapped),
    aten.permute.default: _permute(lambda node, n: tuple(argument(node, "dims"))),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(aten_ops("slice.Tensor narrow"), _slice),
    aten.select.int: _select,
    operator.getitem: _item,
    **dict.fromkeys(
        aten_ops("to.dtype to.dtype_layout to.device to.other type_as _to_copy"), _cast
    ),
    aten.dropout.default: lambda node, shape: None if argument(node, "train") else [],
    **dict.fromkeys(
        aten_ops("contiguous clone detach alias lift_fresh_copy"), lambda node, shape: []
    ),
}


# The names and values of computed weights.
#
# Their key is `PATH.weight~`, and an update is one of the effective weight. PATH.weight is the name
# that the user knows: `lin.weight~` for `lin.parametrizations.weight.original0` and for
# `lin.weight_v`.


_HELD = re.compile(r"(^|\.)parametrizations\.([^.]+)\..*$")
_PARTS = re.compile(r"_(g|v|orig)$")


def effective_name(behind: tuple[str, ...]) -> str:
    """The name of what parameters make together, with the ~ of a computed weight.

    >>> effective_name(("lin.parametrizations.weight.original0",))
    'lin.weight~'
    >>> effective_name(("c.weight_g", "c.weight_v")), effective_name(("a.q.weight", "a.k.weight"))
    ('c.weight~', 'a.weight~')
    """
    names = {_PARTS.sub("", _HELD.sub(r"\1\2", n)) for n in behind}
    if len(names) == 1:
        return names.pop() + "~"
    paths = [n.split(".")[:-1] for n in names]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join([*(level[0] for level in shared), "weight"]) + "~"


class Namer:
    """Gives computed weights their names, and the same name to equal computations."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, int]] = {}

    def __call__(self, weight: FxWeight) -> str:
        """The parameter's name, or that of the computed weight."""
        if weight.name:
            return weight.name
        name = effective_name(weight.behind)
        recipes = self.known.setdefault(name, {})
        i = recipes.setdefault(_recipe(weight.root, {}), len(recipes))
        return f"{name}{i}" if i else name


def _recipe(node: fx.Node, memo: dict[fx.Node, str]) -> str:
    """How a value is computed, as a text that is equal for equal computations."""
    if node not in memo:
        inner: object = fx.node.map_aggregate(
            (node.args, node.kwargs),
            lambda a: _recipe(a, memo) if isinstance(a, fx.Node) else repr(a),
        )
        called = node.op == "call_function"
        memo[node] = f"{op_name(node)}{inner}" if called else str(node.target)
    return memo[node]


def evaluate(root: torch.nn.Module, flow: FxFlow, node: fx.Node) -> torch.Tensor:
    """The value of a node that depends on parameters and constants only.

    Ops that edit intermediate values in place run as well; buffers are copied first.
    """
    wanted = _made_from(node)
    for n in node.graph.nodes:  # what edits an intermediate belongs to its value
        if n is node:
            break
        if flow.fixed(n) and any(w in wanted for w in written_by(n)):
            wanted |= _made_from(n)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for n in node.graph.nodes:
            if n not in wanted:
                continue
            if n.target is getattr:
                values[n] = device_of(root)
            elif n.op == "get_attr":
                module, leaf = owner(root, str(n.target))
                values[n] = getattr(module, leaf).detach().clone()
            else:
                args, kwargs = fx.node.map_aggregate(
                    (n.args, n.kwargs), lambda a: values[a] if isinstance(a, fx.Node) else plain(a)
                )
                values[n] = n.target(*args, **kwargs)
    result: torch.Tensor = values[node]
    return result


def _made_from(node: fx.Node) -> set[fx.Node]:
    """A node and all that its value depends on; a device is known without its tensor."""
    return set(reached([node], lambda n: [] if n.target is getattr else n.all_input_nodes))
