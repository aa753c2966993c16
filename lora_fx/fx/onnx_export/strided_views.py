"""Views by strides of storage whose order differs from the order of its dimensions.

The exporter takes storage to be in the order of the dimensions: of a transposed tensor it reads
other numbers. So the dimensions are put into the order of the storage first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lora_fx.fx.graph.nodes import argument, hint, value


def rewrite_strided_view(graph: fx.Graph, node: fx.Node) -> None:
    """Rewrite a view of storage that is dense, though not in the order of its dimensions."""
    x = node.args[0]
    stored = value(x) if isinstance(x, fx.Node) else None
    if not isinstance(stored, Tensor) or stored.layout != torch.strided:
        return
    order = _dense_order(stored)
    if order is None:
        return

    start = stored.storage_offset()
    offset = argument(node, "storage_offset")
    first = 0
    if offset is not None:
        if not (isinstance(offset, int) and isinstance(start, int)):
            return  # free sizes before the view
        first = offset - start

    in_order = order == sorted(order)
    if not in_order or (offset is not None and start):
        size = argument(node, "size")
        stride = argument(node, "stride")
        node.target = in_storage
        node.args = (x, order, size, stride, first)
        node.kwargs = {}


def _dense_order(stored: Tensor) -> list[int] | None:
    """The dimensions in the order of the storage, the slowest first.

    None for a view with gaps, or of numbers that are read twice.
    """
    sizes = [hint(size) for size in stored.shape]
    strides = [hint(stride) for stride in stored.stride()]
    order = sorted(range(len(sizes)), key=lambda d: -strides[d] if sizes[d] != 1 else 0)
    dense = 1
    for d in reversed(order):
        if sizes[d] == 1:
            continue
        if strides[d] != dense:
            return None
        dense *= sizes[d]
    return order


def in_storage(
    x: Tensor, order: Sequence[int], size: Sequence[int], stride: Sequence[int], first: int
) -> Tensor:
    """A view by strides of a tensor whose dimensions have this order in its storage."""
    stored: Tensor = x.permute(*order).clone(memory_format=torch.contiguous_format)
    return torch.as_strided(stored, list(size), list(stride), first)
