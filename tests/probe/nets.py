"""A small model with two adapters for it, and ways to spoil what is stored of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Report

IDS = torch.tensor([[1, 5, 2], [7, 3, 0]])


class Net(nn.Module):
    """A table, a square layer and a head; the two layers are a group of targets each."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(23, 12)
        self.q_proj = nn.Linear(12, 12)
        self.down_proj = nn.Linear(12, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.down_proj(torch.tanh(x + self.q_proj(x)))


def net(seed: int = 0) -> Net:
    return Net(seed).eval()


def adapter(seed: int, model: nn.Module | None = None, size: float = 0.15) -> Adapter:
    """An adapter of rank 3 whose factors are all drawn."""
    module = lora_fx.insert(model or net(), (IDS,), rank=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    return module.adapter()


def adapters() -> dict[str, Adapter]:
    return {"de": adapter(1), "fr": adapter(2)}


def multiplied(update: Adapter, factor: float, key: str = "") -> Adapter:
    """An adapter whose B, of the keys that begin so, is multiplied."""
    entries = dict(update.entries)
    for name, low in update.lowrank.items():
        if name.startswith(key):
            entries[name] = replace(low, b=low.b * np.float32(factor))
    return replace(update, entries=entries)


def turned(update: Adapter) -> Adapter:
    """An adapter with a square A and B in each other's place."""
    low = update.lowrank["q_proj.weight"]
    other = replace(low, a=low.b.T.copy(), b=low.a.T.copy())
    return replace(update, entries={**update.entries, "q_proj.weight": other})


def cut(update: Adapter) -> Adapter:
    """An adapter without its last rank."""
    entries = {
        key: replace(low, a=low.a[:-1], b=low.b[:, :-1], alpha=low.alpha * 2 / 3)
        for key, low in update.lowrank.items()
    }
    return replace(update, entries=entries)


SPOILT: Mapping[str, tuple[Callable[[Adapter], Adapter], str]] = {
    "as it is": (lambda one: one, "right"),
    "another adapter": (lambda _: adapter(2), "adapter fr"),
    "an unknown adapter": (lambda _: adapter(5), "differs"),
    "twice the scale": (lambda one: multiplied(one, 2), "scaled by 2"),
    "half the scale": (lambda one: multiplied(one, 0.5), "scaled by 0.5"),
    "a scale between": (lambda one: multiplied(one, 1.5), "scaled by 1.5"),
    "all zeros": (lambda one: multiplied(one, 0), "no effect"),
    "a group of zeros": (lambda one: multiplied(one, 0, "q_proj"), "without q"),
    "A and B turned": (turned, "differs"),
    "a rank less": (cut, "differs"),
    "infinite numbers": (lambda one: multiplied(one, float("inf")), "not finite"),
}
"""What happens to the stored adapter de, and the verdict on it."""


def verdicts(report: Report) -> dict[str, str]:
    """The verdict of a report by the adapter's name; that of the base by an empty name."""
    return {row["adapter"] or "": row["verdict"] for row in report.details["verdicts"]}
