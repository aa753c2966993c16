"""Which cheap steps make a value, from what, and what autograd keeps for them.

A chain is a norm, an activation, a gate, with the casts and views around it. Running it again
costs a pass over memory, which is little beside a matrix product; keeping its result and what its
steps keep costs bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from lora_fx.fx.graph.nodes import MARK, aten_ops, dtype_of, is_marked, make_marked, numel, value

aten = torch.ops.aten

VIEWS = aten_ops("view reshape _unsafe_view flatten.using_ints unflatten.int")
CASTS = aten_ops("to.dtype _to_copy type_as")
NOTHING = aten_ops("mean.dim neg mul.Scalar add.Scalar sub.Scalar")
SUMS = aten_ops("add.Tensor sub.Tensor")
INPUT = aten_ops(
    "layer_norm rms_norm group_norm pow.Tensor_Scalar square "
    "gelu silu mish softplus hardswish leaky_relu elu"
)
OUTPUT = aten_ops("relu rsqrt sqrt reciprocal tanh sigmoid exp")
PRODUCTS = aten_ops("mul.Tensor div.Tensor")
CHEAP = VIEWS | CASTS | NOTHING | SUMS | INPUT | OUTPUT | PRODUCTS
"""Sets are by what the op keeps for its backward: nothing, its input, its output, the factors."""


@dataclass(frozen=True)
class Chain:
    """Steps that make a value, in the order of the graph.

    Attributes:
        steps: The nodes; the value is the last.
        given: What they read: tensors, parameters and sizes.
        gain: Bytes at the example's sizes that are not kept when the chain runs again, less those
            of what it is given.
    """

    steps: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    gain: int


def chain_of(
    x: fx.Node, differentiable: Mapping[fx.Node, bool], written: Collection[fx.Node]
) -> Chain | None:
    """The steps to run again for x; None where that gains nothing.

    Args:
        x: The value.
        differentiable: Nodes through which a gradient can flow.
        written: Nodes that some op changes in place.
    """
    walks = (_walk(x, written, sums) for sums in (False, True))
    chains = [_weigh(x, *found, differentiable) for found in walks if found is not None]
    best = max(chains, key=lambda chain: chain.gain, default=None)
    return best if best is not None and 4 * best.gain >= nbytes(x) else None


def _walk(
    x: fx.Node, written: Collection[fx.Node], sums: bool
) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """(steps, what they read): every cheap node whose users are all among the steps."""
    steps: dict[fx.Node, None] = {}
    trail, todo, node = _trail(x), {x}, x
    while todo:
        if node in todo:
            todo.remove(node)
            inside = all(u in steps for u in node.users)
            if (inside or node is x or node in trail) and _cheap(node, x, written, sums):
                steps[node] = None
                todo |= {i for i in node.all_input_nodes if i.target in CHEAP}
        node = node.prev
    order = list(reversed(steps))
    given = dict.fromkeys(i for n in order for i in n.all_input_nodes if i not in steps)
    if x not in steps or any(g in written for g in given):
        return None
    return None if all(n.target in VIEWS | CASTS for n in order) else (order, list(given))


def _trail(x: fx.Node) -> list[fx.Node]:
    """The values that x is a view of: others may read them too."""
    trail = []
    while x.target in VIEWS and isinstance(x.args[0], fx.Node):
        x = x.args[0]
        trail.append(x)
    return trail


def _cheap(node: fx.Node, x: fx.Node, written: Collection[fx.Node], sums: bool) -> bool:
    if node.op != "call_function" or node.target not in CHEAP or is_marked(node):
        return False
    if node in written or not isinstance(value(node), torch.Tensor):
        return False
    if node.target in SUMS and not sums:
        data = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
        return sum(2 * nbytes(a) > nbytes(x) for a in data) < 2
    return True


def _weigh(
    x: fx.Node, steps: list[fx.Node], given: list[fx.Node], differentiable: Mapping[fx.Node, bool]
) -> Chain:
    held = {stored(x), *(stored(n) for step in steps for n in keeps(step, differentiable))}
    kept = {n for n in held if n.op != "get_attr"}
    reads = {stored(g) for g in given if g.op != "get_attr"}
    gain = sum(map(nbytes, kept - reads)) - sum(map(nbytes, reads - kept))
    return Chain(tuple(steps), tuple(given), gain)


def keeps(node: fx.Node, differentiable: Mapping[fx.Node, bool]) -> list[fx.Node]:
    """What autograd keeps of a cheap node's operands and result."""
    if not differentiable.get(node):
        return []
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if node.target in INPUT:
        return operands[:1]
    if node.target in OUTPUT:
        return [node]
    if node.target in PRODUCTS and len(operands) == 2:
        first, second = operands
        return [a for a, b in ((first, second), (second, first)) if differentiable.get(b)]
    return []


def stored(node: fx.Node) -> fx.Node:
    """The node whose memory a value lies in, through views and casts to its own dtype."""
    while True:
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, fx.Node):
            return node
        same = node.target in CASTS and dtype_of(node) == dtype_of(source)
        if node.target not in VIEWS and not same:
            return node
        node = source


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's tensor at the example's sizes; 0 for anything else."""
    v = value(node)
    return numel(tuple(v.shape)) * v.element_size() if isinstance(v, torch.Tensor) else 0


def differentiable_nodes(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, bool]:
    """Which values a gradient may flow through: inputs, what is trained, and what depends on them.

    Args:
        graph: Nodes with the values that the capture saw.
        root: Holds the tensors.
    """
    found: dict[fx.Node, bool] = {}
    named = root.named_parameters(remove_duplicate=False)
    trained = {n for n, p in named if p.requires_grad}
    for node in graph.nodes:
        v = value(node)
        if isinstance(v, torch.Tensor) and not v.is_floating_point():
            found[node] = False
        elif node.op == "placeholder":
            found[node] = isinstance(v, torch.Tensor)
        elif node.op == "get_attr":
            found[node] = str(node.target) in trained
        else:
            found[node] = any(found.get(i, False) for i in node.all_input_nodes)
    return found


@dataclass(frozen=True)
class Projection:
    """One product x·aᵀ: `node` = matmul(x, permute(type_as(a, x))), a the get_attr of [rank, in].

    Several a's stand below each other where `share` has joined their products.
    """

    node: fx.Node
    x: fx.Node
    factors: tuple[fx.Node, ...]


def projections(graph: fx.Graph) -> Iterator[Projection]:
    """Every product of an activation with factors of branches, in the order of the graph."""
    for node in graph.nodes:
        x, turned = operands(node, aten.matmul.default) or (None, None)
        cast, perm = operands(turned, aten.permute.default) or (None, None)
        a, like = operands(cast, aten.type_as.default) or (None, None)
        if perm != [1, 0] or like is not x:
            continue
        held = tuple((operands(a, aten.cat.default) or [[a]])[0])
        if all(isinstance(n, fx.Node) and n.op == "get_attr" for n in held):
            yield Projection(node, x, held)


def operands(node: object, target: object) -> tuple[Any, ...]:
    """The arguments of a branch's node where it is this op and has no keywords; else nothing."""
    if not isinstance(node, fx.Node) or node.target is not target or not is_marked(node):
        return ()
    return tuple(node.args) if not node.kwargs else ()


def maker(before: fx.Node, branch: fx.Node) -> Callable[..., fx.Node]:
    """What makes nodes before one of a graph, in its module and with the mark of a branch.

    It takes an op or function, args and kwargs, or the name of a tensor alone: see make_marked.
    """
    return partial(make_marked, before, before, branch.meta["custom"][MARK]["site"])
