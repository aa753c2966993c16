"""A model with a lookup, a layer on tokens and a layer on their mean, of any sizes."""

from __future__ import annotations

import torch
from torch import nn


class TokenNet(nn.Module):
    """A lookup, and layers on [batch, tokens, width] (MatMul) and on [batch, width] (Gemm)."""

    def __init__(self, width: int = 6, inner: int = 9, outputs: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, outputs)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.table(ids))).mean(1))
