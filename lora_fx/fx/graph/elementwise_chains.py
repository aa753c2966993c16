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
"""The sets are grouped by what an op keeps for backward: nothing, input, output, or factors."""


@dataclass(frozen=True)
class Chain:
    """Steps that make a value, in the order of the graph.

    Attributes:
        steps: The nodes; the value is the last.
        reads: What they read: tensors, parameters and sizes.
        gain: Bytes at the example's sizes that are not kept when the chain runs again, less those
            of what it reads.
    """

    steps: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
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
    chains = [_walk(x, differentiable, written, sums) for sums in (False, True)]
    best = max(filter(None, chains), key=lambda chain: chain.gain, default=None)
    if best is None or 4 * best.gain < nbytes(x):
        return None
    return best


def _walk(
    x: fx.Node, differentiable: Mapping[fx.Node, bool], written: Collection[fx.Node], sums: bool
) -> Chain | None:
    """The chain of every cheap node whose users are all among the steps.

    Args:
        x: The value.
        differentiable: Nodes through which a gradient can flow.
        written: Nodes that some op changes in place.
        sums: Whether a sum of two large tensors is a step, or where the chain begins.
    """
    steps = _cheap_steps(x, written, sums)
    if x not in steps or all(step.target in VIEWS | CASTS for step in steps):
        return None
    reads: dict[fx.Node, None] = {}
    for step in steps:
        reads.update((operand, None) for operand in step.all_input_nodes if operand not in steps)
    if any(operand in written for operand in reads):
        return None

    # what autograd keeps of the chain as it is, and what it keeps of a chain that runs again
    saved_before = {stored(x)}
    for step in steps:
        saved_before.update(stored(node) for node in keeps(step, differentiable))
    saved_before = {node for node in saved_before if node.op != "get_attr"}
    saved_after = {stored(operand) for operand in reads if operand.op != "get_attr"}
    freed = sum(map(nbytes, saved_before - saved_after))
    added = sum(map(nbytes, saved_after - saved_before))
    return Chain(tuple(steps), tuple(reads), freed - added)


def _cheap_steps(x: fx.Node, written: Collection[fx.Node], sums: bool) -> list[fx.Node]:
    """The cheap nodes that make x and are read by each other alone, in the order of the graph."""

    def viewed(node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes[:1] if node.target in VIEWS else []

    behind_views = set(reached([x], viewed))  # others may read these too
    steps: dict[fx.Node, None] = {}
    candidates = {x}
    node = x
    while candidates:
        if node in candidates:
            candidates.remove(node)
            is_inside = node in behind_views or all(user in steps for user in node.users)
            if is_inside and _is_cheap(node, x, written, sums):
                steps[node] = None
                operands = node.all_input_nodes
                candidates.update(operand for operand in operands if operand.target in CHEAP)
        node = node.prev
    return list(reversed(steps))


def _is_cheap(node: fx.Node, x: fx.Node, written: Collection[fx.Node], sums: bool) -> bool:
    if node.op != "call_function" or node.target not in CHEAP or is_marked(node):
        return False
    if node in written or not isinstance(value(node), torch.Tensor):
        return False
    if node.target in SUMS and not sums:
        data = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.op != "get_attr"]
        large = [arg for arg in data if 2 * nbytes(arg) > nbytes(x)]
        return len(large) < 2
    return True


def keeps(node: fx.Node, differentiable: Mapping[fx.Node, bool]) -> list[fx.Node]:
    """The operands and results of a cheap node that autograd keeps."""
    if not differentiable.get(node):
        return []
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if node.target in INPUT:
        return operands[:1]
    if node.target in OUTPUT:
        return [node]
    if node.target in PRODUCTS and len(operands) == 2:
        first, second = operands
        factors = []
        if differentiable.get(second):
            factors.append(first)
        if differentiable.get(first):
            factors.append(second)
        return factors
    return []


def stored(node: fx.Node) -> fx.Node:
    """The node whose memory holds a value, through views and casts to its own dtype."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return node
    source = node.args[0]
    if node.target in VIEWS:
        return stored(source)
    if node.target in CASTS and dtype_of(node) == dtype_of(source):
        return stored(source)
    return node


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's tensor at the example's sizes; 0 for anything else."""
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor):
        return 0
    return numel(tuple(tensor.shape)) * tensor.element_size()


def differentiable_nodes(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, bool]:
    """The nodes that a gradient may flow through: inputs, trained tensors, and their results.

    Args:
        graph: Nodes with the values that the capture saw.
        root: Holds the tensors.
    """
    differentiable: dict[fx.Node, bool] = {}
    named = root.named_parameters(remove_duplicate=False)
    trained = {name for name, parameter in named if parameter.requires_grad}
    for node in graph.nodes:
        captured = value(node)
        if isinstance(captured, torch.Tensor) and not captured.is_floating_point():
            differentiable[node] = False
        elif node.op == "placeholder":
            differentiable[node] = isinstance(captured, torch.Tensor)
        elif node.op == "get_attr":
            differentiable[node] = str(node.target) in trained
        else:
            operands = node.all_input_nodes
            differentiable[node] = any(differentiable.get(operand, False) for operand in operands)
    return differentiable
