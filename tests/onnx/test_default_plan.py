"""What the default plan adapts runs in every mode: a bilinear layer, one use of a tied weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import rel
from lora_fx.onnx import Session
from lora_fx.onnx.session import open_session

GATE = 2e-6


class Pairs(nn.Module):
    """Two inputs, the second of which meets the first in a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.pairs = nn.Bilinear(6, 5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.pairs(self.first(x), y)


class Tied(nn.Module):
    """A head that reads the table of the embedding; the default plan adapts the head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(ids))))


def pairs() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Pairs(), (torch.randn(3, 7, 4), torch.randn(3, 7, 5))


def tied() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Tied(), (torch.randint(13, (3, 7)),)


def drawn(model: nn.Module, args: tuple[Tensor, ...], variant: str) -> tuple[Adapter, np.ndarray]:
    """Return an adapter by the default plan, and what the adapted module gives."""
    module = lora_fx.insert(model, args, rank=2, variant=variant).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        return module.adapter(), module(*args).numpy()


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("make", [pairs, tied])
def test_every_mode(make: Any, variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, args = make()
    model.eval()
    adapter, want = drawn(model, args, variant)
    names = [spec.name for spec in lora_fx.capture(model, args).inputs.specs]
    feeds = {name: x.numpy() for name, x in zip(names, args, strict=True)}

    def export(mode: Any) -> Path:
        path = tmp_path / mode / "m.onnx"
        path.parent.mkdir()
        lora_fx.export(model, path, args, adapters={"a": adapter}, mode=mode, provider="cpu")
        return path

    switch = Session(export("switch"), provider="cpu")
    switch.load("a", tmp_path / "switch" / "a.onnx_adapter")
    load = Session(export("load"), provider="cpu", adapter=tmp_path / "load" / "a.onnx_adapter")
    batch = open_session(export("batch"), "cpu")
    merged = open_session(export("merged"), "cpu")
    runs = {
        "switch": switch.run(feeds, "a"),
        "load": load.run(feeds),
        "batch": batch.run({**feeds, "adapter_ids": np.ones(3, np.int64)}),
        "merged": merged.run(feeds),
    }
    for mode, outputs in runs.items():
        (y,) = outputs.values()
        assert rel(y, want) < GATE, mode
