"""Small modules around torch's own recurrent, convolutional and table layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bag(nn.Module):
    """The mean of a bag of embeddings, then a linear layer."""

    def __init__(self, rows: int, width: int, out: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(rows, width, mode="mean")
        self.out = nn.Linear(width, out)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.bag(ids))


class Recurrent(nn.Module):
    """A recurrent layer and a linear layer on its outputs."""

    def __init__(self, layer: nn.RNNBase, out: int) -> None:
        super().__init__()
        self.layer = layer
        width = (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0])


class Cell(nn.Module):
    """An LSTM cell, four steps by hand."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in range(4):
            state = self.cell(x[:, step], state)
        return state[0]


class Unet(nn.Module):
    """A convolution down, a transposed one up, and a skip between."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.norm = nn.GroupNorm(2, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.leave = nn.Conv2d(2 * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.silu(self.enter(x))
        deep = F.silu(self.norm(self.down(wide)))
        return self.leave(torch.cat([wide, self.up(deep)], dim=1))


class StandardConv(nn.Conv2d):
    """A convolution that standardises its weight on every call."""

    def forward(self, x: Tensor) -> Tensor:
        axes = (1, 2, 3)
        w = self.weight - self.weight.mean(axes, keepdim=True)
        w = w / (w.std(axes, keepdim=True) + 1e-5)
        return self._conv_forward(x, w / w[0].numel() ** 0.5, self.bias)


class TwoInputs(nn.Module):
    """A dictionary of tensors and a scale by keyword."""

    def __init__(self, left: int, right: int, out: int) -> None:
        super().__init__()
        self.left = nn.Linear(left, out)
        self.right = nn.Linear(right, out)

    def forward(self, pair: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        total = self.left(pair["left"]) + self.right(pair["right"])
        return {"sum": total * scale, "gate": total.sigmoid()}
