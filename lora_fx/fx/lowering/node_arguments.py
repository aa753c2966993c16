"""The nodes among a node's arguments, and nodes made with others in their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from lora_fx.fx.trees import tree_leaves, tree_map_only


def read_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, repeated as often as they occur."""
    leaves = tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def call_with(node: fx.Node, operands: Iterator[Any]) -> Any:
    """(args, kwargs) of a node with these operands in the places of the nodes that it reads."""
    return tree_map_only(fx.Node, lambda _: next(operands), (node.args, node.kwargs))


def valued(graph: fx.Graph, val: object, target: Any, *call: Any) -> fx.Node:
    """A new node with its value; `call` is its args and kwargs."""
    new = graph.call_function(target, *call)
    new.meta["val"] = val
    return new
