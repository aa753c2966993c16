"""Models that read one table by lookup and by product; each can also run with ΔW put in by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.lowrank import draw

ROWS, WIDTH = 40, 6


class Raw(nn.Module):
    """One parameter, read twice in one forward."""

    name = "w"
    names = ("w",)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(ROWS, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(F.embedding(ids, self.w)) @ self.w.T

    def changed(self, ids: Tensor, look: Any, head: Any) -> Tensor:
        return torch.tanh(F.embedding(ids, self.w + look)) @ (self.w + head).T


class Table(nn.Module):
    """A lookup, as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(ROWS, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.w)


class Inner(nn.Module):
    """The table belongs to the module of the lookup, and the root multiplies by it."""

    name = "table.w"
    names = ("table.w", "w")

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.table(ids)) @ self.table.w.T

    def changed(self, ids: Tensor, look: Any, head: Any) -> Tensor:
        w = self.table.w
        return torch.tanh(F.embedding(ids, w + look)) @ (w + head).T


class Aliased(nn.Module):
    """nn.Embedding and nn.Linear, tied: one tensor of two names."""

    name = "emb.weight"
    names = ("emb", "emb.weight", "head", "out.head.weight")

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(ROWS, WIDTH)
        self.out = nn.ModuleDict({"head": nn.Linear(WIDTH, ROWS, bias=False)})
        self.out["head"].weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out["head"](torch.tanh(self.emb(ids)))
        return out

    def changed(self, ids: Tensor, look: Any, head: Any) -> Tensor:
        w = self.emb.weight
        return F.linear(torch.tanh(F.embedding(ids, w + look)), w + head)


class Called(nn.Module):
    """nn.Embedding, whose weight an einsum contracts."""

    name = "emb.weight"
    names = ("emb", "re:emb")

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(ROWS, WIDTH, padding_idx=3)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.einsum("bsd,vd->bsv", torch.tanh(self.emb(ids)), self.emb.weight)

    def changed(self, ids: Tensor, look: Any, head: Any) -> Tensor:
        w = self.emb.weight
        return torch.tanh(F.embedding(ids, w + look)) @ (w + head).T


class Three(nn.Module):
    """Two lookups and a head, as an encoder and a decoder share them."""

    name = "shared.weight"
    names = ("shared", "decoder", "lm_head")

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.decoder = nn.Embedding(ROWS, WIDTH), nn.Embedding(ROWS, WIDTH)
        self.lm_head = nn.Linear(WIDTH, ROWS)
        self.decoder.weight = self.lm_head.weight = self.shared.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(ids).mean(1, keepdim=True) + self.decoder(ids)
        out: Tensor = self.lm_head(torch.tanh(x))
        return out

    def changed(self, ids: Tensor, look: Any, head: Any) -> Tensor:
        w = self.shared.weight + look
        x = F.embedding(ids, w).mean(1, keepdim=True) + F.embedding(ids, w)
        return F.linear(torch.tanh(x), self.shared.weight + head, self.lm_head.bias)


class Sliced(nn.Module):
    """The head knows only the first rows."""

    name = "w"
    names = ("w",)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(ROWS, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.embedding(ids, self.w)), self.w[:30])

    def changed(self, ids: Tensor, look: Any, head: Any) -> Tensor:
        return F.linear(torch.tanh(F.embedding(ids, self.w + look)), (self.w + head)[:30])


TIED: dict[str, Any] = {c.__name__: c for c in (Raw, Inner, Aliased, Called, Three, Sliced)}


class Apart(nn.Module):
    """A twin: table and head are two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.emb(ids)))
        return out


def built(make: Callable[[], Any], seed: int = 0) -> tuple[Any, Tensor]:
    """A model in eval mode with weights that matter, and its ids."""
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, p.shape[-1] ** -0.5)
    return model, torch.randint(0, ROWS, (2, 5))


def values(updates: Any) -> lora_fx.Adapter:
    """An adapter of these shapes whose a and b are random."""
    made = {}
    for key, u in updates.items():
        a, b = draw(key, u.layout, u.rank, 0, "probe")
        made[key] = replace(u, a=a, b=b * np.float32(0.5))
    return lora_fx.Adapter(made)


def adapted(model: nn.Module, ids: Tensor, include: Any) -> Any:
    """The module that insert returns, with random values."""
    module = lora_fx.insert(model, (ids,), rank=2, include=include)
    read = module.adapter().metadata
    module.load_adapter(replace(values(module.updates), metadata=read))
    return module


def explicit(model: Any, ids: Tensor, look: Any, head: Any) -> Any:
    """The model's own code in fp64 with W + ΔW at the lookups and at the head."""
    plain = copy.deepcopy(model).double()
    ds = [torch.from_numpy(d) if isinstance(d, np.ndarray) else d for d in (look, head)]
    with torch.no_grad():
        return plain.changed(ids, *ds).numpy()


def out(module: Any, ids: Tensor) -> Any:
    with torch.no_grad():
        return module(ids).numpy()
