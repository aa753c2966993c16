"""Find which storage a graph's ops change in place, and when."""

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
    """The storage that a graph's ops change in place, and when.

    A storage is known by the nodes that made it, a tensor of the tree by its name. A result lies in
    the storage of an operand where the op's schema says that it may.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order: dict[fx.Node, int] = {}
        self.storage: dict[fx.Node, Storage] = {}
        self.writes: list[tuple[int, Storage]] = []
        for position, node in enumerate(graph.nodes):
            self.order[node] = position
            self.storage[node] = self._storage_of(node)
            for operand in written_by(node):
                self.writes.append((position, self.storage[operand]))

    def _storage_of(self, node: fx.Node) -> Storage:
        if node.op == "get_attr":
            return frozenset((str(node.target),))
        if node.target is operator.getitem:
            several = node.all_input_nodes[0]
            if _makes_separate_results(several):
                # all who read this result share it
                first_reader = next(user for user in several.users if user.args[1] == node.args[1])
                return frozenset((first_reader,))
            operands = node.all_input_nodes
        else:
            operands = aliased_by(node)
        shared = frozenset().union(*(self.storage[operand] for operand in operands))
        return shared or frozenset((node,))

    def between(self, value: fx.Node, start: fx.Node, end: fx.Node | None = None) -> bool:
        """Whether something writes to a value's storage after one node and before another."""
        first = self.order[start]
        last = len(self.order) if end is None else self.order[end]
        storage = self.storage[value]
        return any(
            first < position < last and storage & changed for position, changed in self.writes
        )

    def ever(self) -> set[fx.Node]:
        """Values that some op changes in place, and all values in the same storage."""
        changed = frozenset().union(*(storage for _, storage in self.writes))
        return {node for node, storage in self.storage.items() if storage & changed}


def _makes_separate_results(node: fx.Node) -> bool:
    """Whether an op returns several new tensors, such as the two of a topk."""
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return len(returns) > 1 and all(result.alias_info is None for result in returns)


def aliased_by(node: fx.Node) -> list[fx.Node]:
    """The operands that a node's result may share storage with."""
    if node.target in _MAY_ALIAS:
        return [operand for operand in node.args[:1] if isinstance(operand, fx.Node)]
    if node.op != "call_function" or not _may_alias(node.target):
        return []
    return [operand for _, operand in _annotated(node)]


def written_by(node: fx.Node) -> list[fx.Node]:
    """The operands that a node changes in place."""
    return [operand for info, operand in _annotated(node) if info.is_write]


def _annotated(node: fx.Node) -> list[tuple[Any, fx.Node]]:
    """(the schema's alias info, operand) of operands that share a result's storage or change."""
    if node.op != "call_function":
        return []
    annotated = []
    for position, name, info in _annotations(node.target):
        if position < len(node.args):
            operand = node.args[position]
        else:
            operand = node.kwargs.get(name)
        if isinstance(operand, fx.Node):
            annotated.append((info, operand))
    return annotated


@functools.lru_cache(1024)
def _annotations(target: Any) -> tuple[tuple[int, str, Any], ...]:
    """(position, name, alias info) of the arguments for which an op's schema has alias info."""
    arguments = getattr(getattr(target, "_schema", None), "arguments", ())
    return tuple(
        (position, slot.name, slot.alias_info)
        for position, slot in enumerate(arguments)
        if slot.alias_info
    )


@functools.lru_cache(1024)
def _may_alias(target: Any) -> bool:
    """Whether an op's schema says that its result may share the storage of an operand."""
    returns = getattr(getattr(target, "_schema", None), "returns", ())
    return any(result.alias_info for result in returns)
