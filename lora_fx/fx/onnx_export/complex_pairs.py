"""Ops of complex numbers as ops of pairs, since the exporter supports no complex form of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.fx.graph.nodes import value

aten = torch.ops.aten


def _of_pairs(op: Any) -> Callable[..., Tensor]:
    """Return unsqueeze, select or expand for a complex tensor stored as pairs."""

    def of_pairs(x: Tensor, where: int | Sequence[int], *arguments: object) -> Tensor:
        # `where` is an axis, or the sizes of an expand; pairs have one axis more, at the end
        if not isinstance(where, int):
            where = [*where, 2]
        elif where < 0:
            where -= 1
        return torch.view_as_complex(op(torch.view_as_real(x), where, *arguments))

    return of_pairs


OF_PAIRS: dict[object, Callable[..., Tensor]] = {
    op: _of_pairs(op) for op in (aten.unsqueeze.default, aten.select.int, aten.expand.default)
}


def rewrite_complex(graph: fx.Graph, node: fx.Node) -> None:
    """Replace an op of complex numbers by an op of pairs."""
    result = value(node)
    if isinstance(result, Tensor) and result.is_complex():
        node.target = OF_PAIRS[node.target]
