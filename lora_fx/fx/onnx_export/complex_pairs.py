"""Ops of complex numbers as ops of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.fx.graph.nodes import value

aten = torch.ops.aten


def _of_pairs(op: Any) -> Callable[..., Tensor]:
    """unsqueeze, select or expand of the pairs that a complex tensor is."""

    def of_pairs(x: Tensor, where: Any, *rest: object) -> Tensor:
        where = (where if where >= 0 else where - 1) if isinstance(where, int) else [*where, 2]
        return torch.view_as_complex(op(torch.view_as_real(x), where, *rest))

    return of_pairs


OF_PAIRS: dict[object, Callable[..., Tensor]] = {
    op: _of_pairs(op) for op in (aten.unsqueeze.default, aten.select.int, aten.expand.default)
}


def _complex(graph: fx.Graph, node: fx.Node) -> None:
    """The exporter has complex numbers as pairs, and lacks these ops of them."""
    made = value(node)
    if isinstance(made, Tensor) and made.is_complex():
        node.target = OF_PAIRS[node.target]
