"""The nodes of inserted branches: their products x·aᵀ, and a function that makes more nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.nodes import (
    MARK,
    is_marked,
    make_marked,
)

aten = torch.ops.aten


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
        x, transposed = operands(node, aten.matmul.default) or (None, None)
        cast, perm = operands(transposed, aten.permute.default) or (None, None)
        a, dtype_source = operands(cast, aten.type_as.default) or (None, None)
        if perm != [1, 0] or dtype_source is not x:
            continue
        stacked = operands(a, aten.cat.default)
        factors = tuple(stacked[0]) if stacked else (a,)
        if all(isinstance(factor, fx.Node) and factor.op == "get_attr" for factor in factors):
            yield Projection(node, x, factors)


def operands(node: object, target: object) -> tuple[Any, ...]:
    """The arguments of a branch's node where it is this op and has no keywords; else nothing."""
    if not isinstance(node, fx.Node) or node.target is not target or not is_marked(node):
        return ()
    if node.kwargs:
        return ()
    return tuple(node.args)


def maker(before: fx.Node, branch: fx.Node) -> Callable[..., fx.Node]:
    """A function that makes nodes before a node, in its module and with the mark of a branch.

    It takes an op or function, args and kwargs, or the name of a tensor alone: see make_marked.
    """
    return partial(make_marked, before, before, branch.meta["custom"][MARK]["site"])
