"""A projected LSTM, h = P·(o⊙tanh c), computed exactly by plain LSTMs.

It is a plain LSTM whose recurrent weight is W_hh·P, with P after it:

    gates = W_ih·x + W_hh·h = W_ih·x + (W_hh·P)·(o⊙tanh c)

A first state h₀ enters as further inputs of the first step, weighed by W_hh. The exporter writes an
LSTM of wrong shapes instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lora_fx.fx.graph.nodes import argument

aten = torch.ops.aten


def rewrite_lstm(graph: fx.Graph, node: fx.Node) -> None:
    """Replace an LSTM with projections, which has one more parameter per direction."""
    per_direction = 5 if argument(node, "has_biases") else 3
    directions = 2 if argument(node, "bidirectional") else 1
    count = per_direction * directions * argument(node, "num_layers")
    if len(argument(node, "params")) == count:
        node.target = projected_lstm


def projected_lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    *options: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute aten.lstm.input with projections, in eval mode, by plain LSTMs: (output, h, c).

    The options are aten's: dropout, train, bidirectional, batch_first.
    """
    _dropout, _train, bidirectional, batch_first = options
    per_direction = 5 if has_biases else 3
    directions = 2 if bidirectional else 1
    if batch_first:
        x = x.transpose(0, 1)
    last_h = []
    last_c = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            weights = params[i * per_direction : (i + 1) * per_direction]
            backward = direction == 1
            steps = x.flip(0) if backward else x
            y, h, c = _one_direction(steps, hx[0][i], hx[1][i], weights)
            outputs.append(y.flip(0) if backward else y)
            last_h.append(h)
            last_c.append(c)
        x = torch.cat(outputs, -1)
    if batch_first:
        x = x.transpose(0, 1)
    return x, torch.cat(last_h), torch.cat(last_c)


def _one_direction(
    x: Tensor, h: Tensor, c: Tensor, params: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one layer in one direction; x is [time, batch, in]."""
    w_ih, w_hh, *biases, projection = params
    is_first = torch.arange(x.shape[0], device=x.device) == 0
    first = is_first.to(x.dtype)[:, None, None]
    inputs = torch.cat([x, first * h], -1)
    input_weight = torch.cat([w_ih, w_hh], 1)
    state = [torch.zeros_like(c)[None], c[None]]
    weights = [input_weight, w_hh @ projection, *biases]
    y, h, c = aten.lstm.input(inputs, state, weights, bool(biases), 1, 0.0, False, False, False)
    return y @ projection.t(), h @ projection.t(), c
