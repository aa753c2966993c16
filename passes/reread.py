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
from lora_fx.fx.train_regions import Code, code_of, keeps_nothing
from lora_fx.passes.base import PassResult


@dataclass(frozen=True)
class RecomputeWeights:
    """Let products keep codes, or a stack and ids, which are there anyway, and no copied weight."""

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds no product that reads such a weight."""
        weights = graph.flow().weights.items()
        copied = [node for node, weight in weights if _is_copied(weight) and not is_marked(node)]
        chains = dict.fromkeys(node for node in copied if node.op == "call_function")
        modified = False
        for product in _readers(chains):
            row = row_of(product)
            if row is None or row.op.startswith("embedding"):
                continue
            paths = _weight_paths(product, chains)
            if paths:
                _reread(product, paths, chains)
                modified = True
        if modified:
            graph.graph.eliminate_dead_code()
            graph.changed()
        return PassResult(graph, modified)


def _is_copied(weight: FxWeight) -> bool:
    """True for a weight made from codes, and for matrices that indices pick from a stack."""
    if weight.format:
        return True
    return weight.view.picked is not None and not weight.edited


def _readers(chains: Mapping[fx.Node, None]) -> list[fx.Node]:
    """The nodes that read a copied weight, and are no step on the way to another."""
    readers: dict[fx.Node, None] = {}
    for node in chains:
        readers |= dict.fromkeys(user for user in node.users if user not in chains)
    return list(readers)


def _weight_paths(product: fx.Node, chains: Container[fx.Node]) -> list[Path]:
    """The places of copied weights among the arguments of a node."""
    paths: list[Path] = []
    for node in product.all_input_nodes:
        if node in chains:
            paths += slots(product, node)
    return paths


def _reread(product: fx.Node, paths: Sequence[Path], chains: Container[fx.Node]) -> None:
    """Let one call make a product and its weights."""
    weights = [pick(product, path) for path in paths]

    def inputs_in_chain(node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if node in chains else []

    nodes = list(reached(weights, inputs_in_chain))
    sources = [node for node in nodes if node not in chains]
    steps = sorted(node for node in nodes if node in chains)
    make = code_of(sources, steps, weights, f"codes of {product.name}")

    without_weights = product.args
    for path in paths:
        without_weights = replaced(without_weights, path, None)
    args = (tuple(sources), without_weights, dict(product.kwargs))
    with product.graph.inserting_before(product):
        call = product.graph.call_function(rereading(make, product.target, paths), args)
    call.meta = dict(product.meta)
    product.replace_all_uses_with(call)
    product.graph.erase_node(product)


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

    def reread(sources: Sequence[Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        weights = make(*sources)
        for path, weight in zip(paths, weights, strict=True):
            args = replaced(args, path, weight)
        if keeps_nothing():
            return op(*args, **kwargs)

        positions = {w.untyped_storage().data_ptr(): i for i, w in enumerate(weights)}

        def pack(tensor: torch.Tensor) -> object:
            i = positions.get(tensor.untyped_storage().data_ptr())
            if i is None:
                return tensor
            return i, tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            i, size, stride, offset = packed
            weight = make(*sources)[i]
            view: torch.Tensor = weight.as_strided(size, stride, offset)
            return view

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return op(*args, **kwargs)

    return reread
