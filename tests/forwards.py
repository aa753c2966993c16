"""How the table's models run: one function a way of using a weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 - registers its fallback of grouped_mm
from torch import Tensor


def lstm(p: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(1, x.shape[0], 5)
    out: Tensor = torch.lstm(x, (h, h), [p.w, p.u, p.b, p.c], True, 1, 0.0, False, False, True)[0]
    return out


def gru(p: Any, x: Tensor) -> Tensor:
    out: Tensor = torch.gru(
        x, x.new_zeros(1, x.shape[0], 5), [p.w, p.u, p.b, p.c], True, 1, 0.0, False, False, True
    )[0]
    return out


def rnn(p: Any, x: Tensor) -> Tensor:
    """Bidirectional."""
    h = x.new_zeros(2, x.shape[0], 5)
    weights = [p.w, p.u, p.b, p.c, p.v, p.t, p.b, p.c]
    out: Tensor = torch.rnn_tanh(x, h, weights, True, 1, 0.0, False, True, True)[0]
    return out


def lstm_cell(p: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], 5)
    for _ in range(2):
        h, _c = torch.lstm_cell(x, [h, h], p.w, p.u, p.b, p.c)
    return h


def bag(mode: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda p, x: F.embedding_bag(x, p.w, mode=mode)


def gathered(p: Any, x: Tensor) -> Tensor:
    """Each row by the expert that a router chose, as transformers' batched_mm."""
    ids = torch.argmax(x @ p.r, -1)
    return torch.bmm(p.w[ids], x.unsqueeze(-1)).squeeze(-1)


def selected(p: Any, x: Tensor) -> Tensor:
    """The same, the activation first."""
    ids = torch.argmax(x @ p.r, -1)
    return torch.bmm(x.unsqueeze(1), torch.index_select(p.w, 0, ids)).squeeze(1)


def turned(p: Any, x: Tensor) -> Tensor:
    """What was picked is read with the rows behind the matrices."""
    ids = torch.argmax(x @ p.r, -1)
    return torch.einsum("oin,ni->no", p.w[ids].permute(1, 2, 0), x)


def grouped(p: Any, x: Tensor) -> Tensor:
    """Rows sorted by expert, as transformers' grouped_mm."""
    ids = torch.argmax(x @ p.r, -1)
    order = torch.argsort(ids)
    counts = torch.histc(ids.float(), 4, 0, 3).cumsum(0).to(torch.int32)
    y: Tensor = torch.ops.transformers.grouped_mm_fallback(x[order], p.w.transpose(1, 2), counts)
    return y[torch.argsort(order)]


def cond(p: Any, x: Tensor) -> Tensor:
    y: Tensor = torch.cond(
        x.sum() > 0, lambda x: F.linear(x, p.w), lambda x: F.linear(2 * x, p.w), (x,)
    )
    return y


def no_grad(p: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = torch.tanh(F.linear(x, p.w))
    return F.linear(h, p.v)


def autocast(p: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.linear(x, p.w)


def standardised(p: Any) -> Tensor:
    w: Tensor = p.w
    return (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True) * p.g


def householder(p: Any) -> Tensor:
    a = torch.tril(p.w)
    return torch.eye(8, dtype=a.dtype)[:6] @ torch.matrix_exp(a - a.t())


def experts(p: Any, x: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(0).expand(4, -1, -1), p.w).sum(0)


def split(p: Any, x: Tensor) -> Tensor:
    q, k = p.w.split([6, 4])
    return torch.cat([F.linear(x, q), F.linear(x, k)], -1)


def chunk(p: Any, x: Tensor) -> Tensor:
    q, k = p.w.chunk(2)
    return F.linear(x, q) * F.linear(x, k)


def unbind(p: Any, x: Tensor) -> Tensor:
    q, k = p.w.view(2, 5, 8).unbind(0)
    return F.linear(x, q) + 2 * F.linear(x, k)


def chain(p: Any, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated since 1.9, and still in use
        return torch.chain_matmul(x, p.v, p.w)
