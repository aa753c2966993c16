"""reread: weights that are made from codes, or picked by data, are made again in backward.

A weight that is made from codes, y = op(x, view(dequantise(codes))), is made again in backward,
and so are the matrices of a stack that data picks, a copy for each row, y = op(x, w[ids]):

    y = op(x, w)        becomes        y = reread(codes; x)

This pass is torch's own: what is kept for backward is no property of other IRs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.flow import FxWeight
from lora_fx.fx.graph.graph import FxGraph, replaced
from lora_fx.fx.graph.nodes import is_marked, reached
from lora_fx.fx.graph.ops import Path, pick, row_of, slots
from lora_fx.fx.regions import Code, code_of, keeps_nothing
from lora_fx.passes.base import PassResult


@dataclass(frozen=True)
class RecomputeWeights:
    """Let products keep codes, or a stack and ids, which are there anyway, and no copied weight."""

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds no product that reads such a weight."""
        weights = graph.flow().weights.items()
        made = [n for n, w in weights if _copied(w) and not is_marked(n)]
        chains = dict.fromkeys(n for n in made if n.op == "call_function")
        modified = False
        for node in dict.fromkeys(u for n in chains for u in n.users if u not in chains):
            row = row_of(node)
            if row is None or row.op.startswith("embedding"):
                continue
            paths = [p for i in node.all_input_nodes if i in chains for p in slots(node, i)]
            if paths:
                _reread(node, paths, chains)
                modified = True
        if modified:
            graph.graph.eliminate_dead_code()
            graph.changed()
        return PassResult(graph, modified)


def _copied(weight: FxWeight) -> bool:
    """True for what is made from codes, and for the matrices that data picks from a stack."""
    return bool(weight.format) or (weight.view.picked is not None and not weight.edited)


def _reread(node: fx.Node, paths: Sequence[Path], chains: Container[fx.Node]) -> None:
    """Let one call make a product and its weights."""
    weights = [pick(node, p) for p in paths]
    steps = [n for n in reached(weights, lambda n: n.all_input_nodes if n in chains else [])]
    given = [n for n in steps if n not in chains]
    made = sorted(n for n in steps if n in chains)
    make = code_of(given, made, weights, f"codes of {node.name}")
    with node.graph.inserting_before(node):
        rest = node.args
        for path in paths:
            rest = replaced(rest, path, None)
        args = (tuple(given), rest, dict(node.kwargs))
        new = node.graph.call_function(rereading(make, node.target, paths), args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def rereading(make: Code, op: Any, paths: Sequence[Path]) -> Callable[..., torch.Tensor]:
    """An op whose weights are made from codes, or picked, in forward and again in backward.

    Args:
        make: Codes, scales and zeros, or a stack and ids → the weights as the op reads them.
        op: The op.
        paths: Where among its arguments the weights stand.

    Returns:
        (what make takes, arguments, keyword arguments) → what the op gives. Of a weight autograd
        keeps a few numbers: where in it the tensor lay that the op's backward wants.
    """

    def reread(given: Sequence[Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        weights = make(*given)
        for path, weight in zip(paths, weights, strict=True):
            args = replaced(args, path, weight)
        if keeps_nothing():
            return op(*args, **kwargs)
        own = {w.untyped_storage().data_ptr(): i for i, w in enumerate(weights)}

        def pack(t: torch.Tensor) -> object:
            i = own.get(t.untyped_storage().data_ptr())
            return t if i is None else (i, t.size(), t.stride(), t.storage_offset())

        def unpack(kept: Any) -> torch.Tensor:
            if isinstance(kept, torch.Tensor):
                return kept
            i, *place = kept
            again: torch.Tensor = make(*given)[i].as_strided(*place)
            return again

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return op(*args, **kwargs)

    return reread
