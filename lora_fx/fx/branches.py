"""The products x·aᵀ of inserted branches, read from a graph, and the blocks that nodes are in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.nodes import MARK, is_marked, mark

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
        x, turned = operands(node, aten.matmul.default) or (None, None)
        cast, perm = operands(turned, aten.permute.default) or (None, None)
        a, like = operands(cast, aten.type_as.default) or (None, None)
        if perm != [1, 0] or like is not x:
            continue
        held = tuple((operands(a, aten.cat.default) or [[a]])[0])
        if all(isinstance(n, fx.Node) and n.op == "get_attr" for n in held):
            yield Projection(node, x, held)


def operands(node: Any, target: Any) -> tuple[Any, ...]:
    """The arguments of a branch's node where it is this op and has no keywords; else nothing."""
    found = isinstance(node, fx.Node) and node.target is target and is_marked(node)
    return tuple(node.args) if found and not node.kwargs else ()


def block_of(node: fx.Node, blocks: Sequence[str]) -> str:
    """The block among `blocks` whose forward made a node; empty for the rest of the model."""
    stack = {str(v[0]).split("@")[0] for v in node.meta.get("nn_module_stack", {}).values()}
    return next((b for b in blocks if b in stack), "")


@dataclass(frozen=True)
class Maker:
    """Makes nodes before one of a graph, in the module of that one and marked as a branch's.

    Attributes:
        before: Where.
        branch: Whose mark they get.
    """

    before: fx.Node
    branch: fx.Node

    def get_attr(self, name: str) -> fx.Node:
        """Read a tensor of the tree."""
        with self.before.graph.inserting_before(self.before):
            return self._tag(self.before.graph.get_attr(name))

    def call(self, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """One op or function."""
        name = f"lora_{getattr(target, '_opname', target.__name__)}"
        graph = self.before.graph
        with graph.inserting_before(self.before):
            return self._tag(graph.create_node("call_function", target, args, kwargs or {}, name))

    def _tag(self, node: fx.Node) -> fx.Node:
        stack = self.before.meta.get("nn_module_stack")
        if stack is not None:
            node.meta["nn_module_stack"] = stack
        mark(node, self.branch.meta["custom"][MARK]["site"])
        return node
