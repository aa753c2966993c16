"""The nodes among a node's arguments, and nodes made of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from lora_fx.fx.trees import tree_leaves, tree_map_only


def _reads(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, as often as they stand there."""
    return [x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]


def _with(node: fx.Node, given: Iterator[Any]) -> Any:
    """(args, kwargs) of a node with others in the places of the nodes that it reads."""
    return tree_map_only(fx.Node, lambda _: next(given), (node.args, node.kwargs))


def _valued(graph: fx.Graph, val: object, target: Any, *call: Any) -> fx.Node:
    """A new node with its value; `call` is its args and kwargs."""
    new = graph.call_function(target, *call)
    new.meta["val"] = val
    return new
