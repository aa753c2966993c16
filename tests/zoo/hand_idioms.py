"""More hand-written modules: weights that are shared, sliced, gathered, computed, or nested.

As in ``hand``: batch at dimension 0, length at dimension 1 where there is one, ``contracted`` for
``redraw``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Pair(nn.Module):
    """Two linear layers, up and down, with a nonlinearity between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class TiedLinear(nn.Module):
    """A language model whose head is a linear layer with the embedding's weight."""

    def __init__(self, vocab: int, width: int, inner: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.body = Pair(width, inner)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


class LeftTransposed(nn.Module):
    """w.t() @ x, w stored [in, out], x [batch, in, length]."""

    contracted = 0

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_in, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.t() @ x


class OwnWeight(nn.Module):
    """F.linear on the weight of a layer that is never called."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.lin = nn.Linear(fan_in, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lin.weight, self.lin.bias)


class SharedLayer(nn.Module):
    """One block, run three times."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.block = Pair(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + 0.3 * self.block(x)
        return x


class SharedSlices(nn.Module):
    """Two disjoint slices of one weight, each a matrix of its own, one also used twice."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out + 8, fan_in))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight[:-8], self.weight[-8:]
        return F.linear(x, first).sin().sum(-1, keepdim=True) + F.linear(x, second).cos()


class SlicedWeight(nn.Module):
    """A slice of a weight's columns: the rest is never used."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.fan_in = fan_in
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in + 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, : self.fan_in])


class HalfWeight(nn.Module):
    """A weight stored in fp16 and cast on use."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.first = nn.Linear(fan_in, fan_in)
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.weight.to(x.dtype))


class Siamese(nn.Module):
    """One encoder on the two halves of dimension 1."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.encoder = Pair(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.encoder(x[:, 0]), self.encoder(x[:, 1])
        return (left - right).tanh()


class TopK(nn.Module):
    """A mixture of experts, each a pair of layers; every token's best two, weighted."""

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Pair(width, inner) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        best = logits.topk(2, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
        mixed = [gates[..., i, None] * e(x) for i, e in enumerate(self.experts)]
        return torch.stack(mixed).sum(0)


class Gathered(nn.Module):
    """Stacked experts, one matrix gathered for every token."""

    contracted = 2

    def __init__(self, experts: int, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.router = nn.Linear(fan_in, experts)
        self.weight = nn.Parameter(torch.empty(experts, fan_out, fan_in))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        own = self.weight[self.router(tokens).argmax(-1)]
        return torch.bmm(own, tokens.unsqueeze(-1)).squeeze(-1).view(*x.shape[:2], -1)


class Bilinear(nn.Module):
    """nn.Bilinear of the two parts of the last dimension."""

    def __init__(self, left: int, right: int, out: int) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.bilinear = nn.Bilinear(left, right, out)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.split([self.left, self.right], dim=-1)
        return self.bilinear(left.contiguous(), right.contiguous())


class Unrolled(nn.Module):
    """Control flow in Python that depends on no tensor."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair(width, inner) for _ in range(2))

    def forward(self, x: Tensor, deep: bool = True) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i == 0 or deep:
                x = block(x) if self.training else x + block(x)
        return x


class BranchOnValue(nn.Module):
    """A branch on a tensor's value: no graph can have it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.block = Pair(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() > 0 else x


class Cond(nn.Module):
    """A branch on a tensor's value by torch.cond: both sides are graphs of their own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.yes = nn.Linear(width, inner)
        self.no = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cond(x.sum() > 0, lambda x: self.yes(x), lambda x: self.no(x), (x,))


class NoGradRegion(nn.Module):
    """A part that runs without gradients beside one that has them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fixed = nn.Linear(width, inner)
        self.moving = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.fixed(x).sigmoid()
        return self.out(gate * self.moving(x))


class Checkpointed(nn.Module):
    """Blocks under torch.utils.checkpoint while training."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair(width, inner) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.training else block(x))
        return x


class CrossAttention(nn.Module):
    """nn.MultiheadAttention whose keys and values have widths of their own."""

    def __init__(self, width: int, heads: int, kdim: int, vdim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, kdim=kdim, vdim=vdim, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v, need_weights=False)[0]
