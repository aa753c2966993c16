"""Data flow from parameters: which values of a graph are weights, and through which View."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from lora_fx.fx.emitter import is_marked
from lora_fx.fx.nodes import hint, numel, shape_of
from lora_fx.fx.ops import OPS, Use, letters, pick
from lora_fx.fx.tensors import owner
from lora_fx.fx.views import SPLITS, VIEWS
from lora_fx.view import View

aten = torch.ops.aten


@dataclass(frozen=True)
class Weight:
    """A value that is one parameter seen through a View."""

    name: str
    view: View
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Computed:
    """A value computed from parameters alone by more than a view."""

    roots: tuple[str, ...]
    by: str


State = Weight | Computed


def roots(state: State | None) -> tuple[str, ...]:
    """Names of the parameters behind a value."""
    if state is None:
        return ()
    return state.roots if isinstance(state, Computed) else (state.name,)


def tensor(root: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a dotted name."""
    module, leaf = owner(root, name)
    p = module._parameters[leaf]
    assert p is not None
    return p


def weight_states(
    graph: fx.Graph, root: nn.Module, names: Mapping[str, str]
) -> dict[fx.Node, State]:
    """The state of every node that depends on parameters (and constants) only.

    What a matmul makes is data again, even where both its operands are parameters: the layers
    after a position table are ordinary layers.
    """
    states: dict[fx.Node, State] = {}
    constants: set[fx.Node] = set()
    written = _written(graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            name = names.get(str(node.target))
            if name is None:
                constants.add(node)
            else:
                states[node] = Weight(name, View(), tuple(tensor(root, name).shape))
        elif node.op == "call_function":
            if node.target is getattr:  # the device of an input
                constants.add(node)
                continue
            inputs = node.all_input_nodes
            found = [i for i in inputs if i in states]
            if not found:
                if all(i in constants for i in inputs):
                    constants.add(node)
                continue
            if is_marked(node):  # W + ΔW of the weight form: the weight is what it adds to
                adds = node.target is aten.add.Tensor or node.target in VIEWS
                if adds and isinstance(states[found[0]], Weight):
                    states[node] = states[found[0]]
                continue
            state = _view(node, found[0], states[found[0]])
            if state is not None:
                states[node] = state
            elif node.target not in OPS and all(i in states or i in constants for i in inputs):
                behind = tuple(sorted({n for i in found for n in roots(states[i])}))
                states[node] = Computed(behind, op_name(node))
        if node in written and node in states:
            states[node] = Computed(roots(states[node]), "an in-place edit")
    return states


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Values that an op changes in place, and the values that they are views of."""
    result: set[fx.Node] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            while isinstance(value, fx.Node):
                result.add(value)
                views = value.target in VIEWS and value.target is not aten.clone.default
                value = value.args[0] if views or value.target in SPLITS else None
    return result


def _view(node: fx.Node, source: fx.Node, state: State) -> State | None:
    """The state of a node that only views `source`."""
    if node.target in SPLITS and node.args[0] is source:
        return state  # the getitem after it slices
    rule = VIEWS.get(node.target)
    if rule is None or node.args[0] is not source:
        return None
    if isinstance(state, Computed):
        return state
    steps = rule(node, state.shape)
    if steps is None:
        return None
    return Weight(state.name, state.view.then(*steps), tuple(shape_of(node) or state.shape))


def op_name(node: fx.Node) -> str:
    """Linear for aten.linear.default."""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def scope_of(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the innermost module whose forward made the node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "", ""
    path, cls = stack[-1]
    name = cls if isinstance(cls, str) else cls.__name__
    return str(path).split("@")[0], name.rpartition(".")[2]


def site_flops(node: fx.Node, use: Use) -> int:
    """2 · output elements · in; a recurrent weight runs once per step and row; lookups are free."""
    if use.kind.name == "embedding":
        return 0
    w = shape_of(pick(node, use.weight)) or ()
    if use.kind.name == "recurrent":
        x = shape_of(pick(node, use.x)) or ()
        return 2 * numel(w) * numel(x[:-1])
    y = shape_of(node)
    if y is None:
        return 0
    axes = use.kind.axes(tuple(int(n) for n in w))
    split = axes.steps[0].shape if axes.steps else w  # type: ignore[union-attr]
    if use.refusal and len(split) < 2:
        return 2 * numel(y)  # a vector: every element once
    return 2 * numel(y) * numel(tuple(split[i] for i in axes.in_ if i < len(split)))


def data_flops(node: fx.Node) -> int:
    """FLOPs of one product of activations; an einsum multiplies along every letter."""
    y = shape_of(node)
    if y is None:
        return 0
    if node.target is aten.scaled_dot_product_attention.default:
        q, k, v = (shape_of(a) or () for a in node.args[:3])
        return 2 * numel(q) * hint(k[-2]) + 2 * numel(q[:-1]) * numel(v[-2:])
    if node.target is aten.einsum.default:
        shapes = [shape_of(o) or () for o in node.args[1]]  # type: ignore[union-attr]
        terms = letters(str(node.args[0]).replace(" ", ""), [len(s) for s in shapes])
        pairs = (zip(t, s, strict=True) for t, s in zip(terms, shapes, strict=False))
        return 2 * numel(tuple({c: n for pair in pairs for c, n in pair}.values()))
    if op_name(node).startswith("conv"):
        return 2 * numel(y) * numel((shape_of(node.args[1]) or ())[1:])
    first = shape_of(node.args[1 if op_name(node) in ("addmm", "baddbmm") else 0])
    return 2 * numel(y) * hint(first[-1]) if first else 0
