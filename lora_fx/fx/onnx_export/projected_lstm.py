"""A projected LSTM as plain LSTMs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lora_fx.fx.graph.nodes import argument

aten = torch.ops.aten


def _lstm(graph: fx.Graph, node: fx.Node) -> None:
    each = 5 if argument(node, "has_biases") else 3
    ways = 2 if argument(node, "bidirectional") else 1
    if len(argument(node, "params")) == each * ways * argument(node, "num_layers"):
        node.target = projected_lstm


def projected_lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    *rest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.lstm.input with projections, in eval mode, by LSTMs without: (output, h, c)."""
    _dropout, _train, bidirectional, batch_first = rest
    each, ways = (5 if has_biases else 3), (2 if bidirectional else 1)
    x = x.transpose(0, 1) if batch_first else x
    hs, cs = [], []
    for layer in range(layers):
        outputs = []
        for i in range(layer * ways, (layer + 1) * ways):
            backward = i % ways == 1
            own = params[i * each : (i + 1) * each]
            y, h, c = _one_way(x.flip(0) if backward else x, hx[0][i], hx[1][i], own)
            outputs.append(y.flip(0) if backward else y)
            hs.append(h)
            cs.append(c)
        x = torch.cat(outputs, -1)
    return x.transpose(0, 1) if batch_first else x, torch.cat(hs), torch.cat(cs)


def _one_way(
    x: Tensor, h: Tensor, c: Tensor, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction; x is [time, batch, in]."""
    w_ih, w_hh, *biases, project = params
    first = (torch.arange(x.shape[0], device=x.device) == 0).to(x.dtype)[:, None, None]
    wide, weight = torch.cat([x, first * h], -1), torch.cat([w_ih, w_hh], 1)
    state = [torch.zeros_like(c)[None], c[None]]
    y, h, c = aten.lstm.input(
        wide, state, [weight, w_hh @ project, *biases], bool(biases), 1, 0.0, False, False, False
    )
    return y @ project.t(), h @ project.t(), c
