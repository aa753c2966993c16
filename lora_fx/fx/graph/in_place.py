"""What a graph's ops change in place: which storage, and when."""

from __future__ import annotations

import functools
import operator
from typing import Any

from torch import fx

from lora_fx.fx.graph.nodes import (
    aten_ops,
)

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
