"""Small edits that turn a file's graph into one that passes know: its inputs, its branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.nodes import MARK, is_marked

aten = torch.ops.aten


def tensor_places(program: Any) -> list[torch.Tensor]:
    """The fake tensors of a program's tensor inputs, in order."""
    names = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    values = [n.meta.get("val") for n in program.graph.nodes if n.name in names]
    return [v for v in values if isinstance(v, torch.Tensor)]


def shared(shapes: Sequence[Any]) -> list[Any]:
    """Pairs of (leaf, dim) that one symbol of the export stands for."""
    first: dict[str, tuple[int, int]] = {}
    pairs = []
    for i, shape in enumerate(shapes):
        for d, n in enumerate(shape):
            if isinstance(n, torch.SymInt):
                known = first.setdefault(str(n), (i, d))
                if known != (i, d):
                    pairs.append((known, (i, d)))
    return pairs


def match_places(graph: fx.Graph, leaves: Sequence[Any]) -> None:
    """One placeholder for each leaf of the call: constants get one, or lose theirs."""
    places = [n for n in graph.nodes if n.op == "placeholder"]
    tensors = [p for p in places if isinstance(p.meta.get("val"), torch.Tensor)]
    for place in places:
        if place not in tensors:
            place.replace_all_uses_with(place.meta.get("val"))
            graph.erase_node(place)
    wanted = iter(tensors)
    at = None
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            at = next(wanted)
            continue
        anchor = next(iter(graph.nodes)) if at is None else at.next
        with graph.inserting_before(anchor):
            at = graph.placeholder(f"constant_{i}")


def strip_branches(graph: fx.Graph) -> None:
    """Take out what insert put in: a marked sum of a value and a branch is that value again."""
    for node in list(graph.nodes):
        if node.op == "call_function" and is_marked(node) and node.target is aten.add.Tensor:
            value, branch = node.args[:2]
            if isinstance(value, fx.Node) and not is_marked(value) and is_marked(branch):
                node.replace_all_uses_with(value)
    for node in reversed(list(graph.nodes)):
        if is_marked(node):
            if not node.users:
                graph.erase_node(node)
            else:  # a view of the weight, now of the weight alone
                custom = {k: v for k, v in node.meta["custom"].items() if k != MARK}
                node.meta["custom"] = custom
