"""Outputs whose numbers are of very different sizes: masks, and a base that is near zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.onnx.probe_runs import probe_of


class Masked(nn.Module):
    """Scores, of which the last is masked by a number that float32 rounds by 64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.register_buffer("mask", torch.tensor([0.0, 0, 0, 0, -1e9]))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = 40 * self.layer(x) + self.mask
        return scores


class Tiny(nn.Module):
    """A head that begins near zero, beside which every adapter is large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        nn.init.normal_(self.layer.weight, std=1e-7)
        nn.init.constant_(self.layer.bias, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layer(x)
        return scores


@pytest.mark.parametrize("net", [Masked, Tiny])
@pytest.mark.parametrize("mode", ["merged", "switch", "batch"])
def test_a_file_as_it_was_is_right(tmp_path: Path, net: type[nn.Module], mode: str) -> None:
    torch.manual_seed(0)
    model, x = net().eval(), torch.randn(2, 6)
    adapted = lora_fx.insert(model, (x,), rank=2)
    rng = np.random.default_rng(0)
    entries = {
        key: replace(low, b=rng.standard_normal(low.b.shape).astype(np.float32))
        for key, low in adapted.adapter().lowrank.items()
    }
    adapter = Adapter(entries)
    given = adapter if mode == "merged" else {"de": adapter}
    path = tmp_path / "m.onnx"
    lora_fx.export(model, path, (x,), adapters=given, mode=mode)
    report = lora_fx.verify(path, provider="cpu")
    assert report, report
    assert {row["verdict"] for row in report.details["verdicts"]} == {"right"}
    if net is Masked:
        assert {index % 5 for _, index in probe_of(path).points} == {0, 1, 2, 3}
