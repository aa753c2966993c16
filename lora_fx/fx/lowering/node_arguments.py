"""The nodes among a node's arguments, and copies of nodes with other arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from lora_fx.fx.trees import tree_leaves, tree_map_only


def read_nodes(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among the arguments, repeated as often as they occur."""
    leaves = tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def call_with(node: fx.Node, operands: Iterator[Any]) -> Any:
    """Return (args, kwargs) of a node, with its argument nodes replaced by these operands."""
    return tree_map_only(fx.Node, lambda _: next(operands), (node.args, node.kwargs))


def valued(graph: fx.Graph, val: object, target: Any, *call: Any) -> fx.Node:
    """Make a node that has its value; `call` is its args and kwargs."""
    new = graph.call_function(target, *call)
    new.meta["val"] = val
    return new
