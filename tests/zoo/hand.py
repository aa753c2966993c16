"""The zoo's hand-written modules: one idiom of using a weight each.

Each takes any batch size at dimension 0 and, where it has a sequence, any length of it at
dimension 1 (``LeftWeight`` has its free length last). A class whose weight is a bare parameter
names the axis that its product sums over, ``contracted``, for ``redraw``; without one that is
axis 1, as in ``nn.Linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RawMatmul(nn.Module):
    """x @ w, w stored [in, out]."""

    contracted = 0

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_in, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Einsum(nn.Module):
    """A product spelled as an einsum, w stored [in, out]."""

    contracted = 0

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_in, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,io->bso", x, self.weight)


class FLinear(nn.Module):
    """F.linear on bare parameters, w stored [out, in]."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.bias = nn.Parameter(torch.empty(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class FusedQKV(nn.Module):
    """Self-attention whose queries, keys and values come of one linear layer."""

    def __init__(self, width: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of x to itself."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class TiedHead(nn.Module):
    """A language model whose head is its embedding, transposed."""

    def __init__(self, vocab: int, width: int, inner: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.down(F.gelu(self.up(x)))
        return x @ self.embedding.weight.t()


class LeftWeight(nn.Module):
    """w @ x, w stored [out, in], x [batch, in, length]."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x


class BmmExperts(nn.Module):
    """The mean of several linear experts' outputs, their weights stacked [expert, in, out]."""

    def __init__(self, experts: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, fan_in, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1).expand(self.weight.shape[0], -1, -1)
        return torch.bmm(tokens, self.weight).mean(0).view(x.shape[0], x.shape[1], -1)
