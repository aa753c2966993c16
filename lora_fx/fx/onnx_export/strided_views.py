"""Views by strides of storage that lies in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lora_fx.fx.graph.nodes import argument, hint, value


def _by_strides(graph: fx.Graph, node: fx.Node) -> None:
    """A view of storage that is dense, though not in the order of its dimensions."""
    x = node.args[0]
    stored = value(x) if isinstance(x, fx.Node) else None
    if not isinstance(stored, Tensor) or stored.layout != torch.strided:
        return
    sizes = [hint(n) for n in stored.shape]
    strides = [hint(n) for n in stored.stride()]
    order = sorted(range(len(sizes)), key=lambda d: -strides[d] if sizes[d] != 1 else 0)
    dense = 1
    for d in reversed(order):
        if sizes[d] != 1 and strides[d] != dense:
            return  # a view with gaps, or of numbers that are read twice
        dense *= sizes[d]
    start = stored.storage_offset()
    offset = argument(node, "storage_offset")
    if offset is not None and not (isinstance(offset, int) and isinstance(start, int)):
        return  # free sizes before the view
    first = 0 if offset is None else offset - start
    if order != sorted(order) or (offset is not None and start):
        size, stride = (argument(node, name) for name in ("size", "stride"))
        node.target, node.args, node.kwargs = in_storage, (x, order, size, stride, first), {}


def in_storage(
    x: Tensor, order: Sequence[int], size: Sequence[int], stride: Sequence[int], first: int
) -> Tensor:
    """A view by strides of a tensor whose dimensions lie in this order in its storage."""
    stored: Tensor = x.permute(*order).clone(memory_format=torch.contiguous_format)
    return torch.as_strided(stored, list(size), list(stride), first)
