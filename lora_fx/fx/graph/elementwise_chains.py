"""Chains of elementwise steps: which cheap steps make a value, from what, and what autograd keeps.

A chain is a norm, an activation, a gate, with the casts and views around it. Running it again
costs a pass over memory, which is little beside a matrix product; keeping its result and what its
steps keep costs bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from lora_fx.fx.graph.nodes import (
    aten_ops,
    dtype_of,
    is_marked,
    numel,
    reached,
    value,
)

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
    walks = (_walk(x, differentiable, written, sums) for sums in (False, True))
    best = max(filter(None, walks), key=lambda chain: chain.gain, default=None)
    return best if best is not None and 4 * best.gain >= nbytes(x) else None


def _walk(
    x: fx.Node, differentiable: Mapping[fx.Node, bool], written: Collection[fx.Node], sums: bool
) -> Chain | None:
    """The chain of every cheap node whose users are all among the steps."""
    steps: dict[fx.Node, None] = {}
    # what x is a view of: others may read it too
    trail = set(reached([x], lambda n: n.all_input_nodes[:1] if n.target in VIEWS else []))
    todo, node = {x}, x
    while todo:
        if node in todo:
            todo.remove(node)
            inside = all(u in steps for u in node.users)
            if (inside or node in trail) and _cheap(node, x, written, sums):
                steps[node] = None
                todo |= {i for i in node.all_input_nodes if i.target in CHEAP}
        node = node.prev
    order = list(reversed(steps))
    given = dict.fromkeys(i for n in order for i in n.all_input_nodes if i not in steps)
    views = all(n.target in VIEWS | CASTS for n in order)
    if x not in steps or views or any(g in written for g in given):
        return None
    held = {stored(x), *(stored(n) for step in order for n in keeps(step, differentiable))}
    kept = {n for n in held if n.op != "get_attr"}
    reads = {stored(g) for g in given if g.op != "get_attr"}
    gain = sum(map(nbytes, kept - reads)) - sum(map(nbytes, reads - kept))
    return Chain(tuple(order), tuple(given), gain)


def _cheap(node: fx.Node, x: fx.Node, written: Collection[fx.Node], sums: bool) -> bool:
    if node.op != "call_function" or node.target not in CHEAP or is_marked(node):
        return False
    if node in written or not isinstance(value(node), torch.Tensor):
        return False
    if node.target in SUMS and not sums:
        data = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
        return sum(2 * nbytes(a) > nbytes(x) for a in data) < 2
    return True


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
    source = node.args[0] if node.args else None
    if node.op == "call_function" and isinstance(source, fx.Node):
        same = node.target in CASTS and dtype_of(node) == dtype_of(source)
        if same or node.target in VIEWS:
            return stored(source)
    return node


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
