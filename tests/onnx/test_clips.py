"""Clips of one value: the constants that the exporter's rules add for each stay apart.

On 1358f462 ONNX Runtime could not load these files: inverse sigmoids of detectors, bounds by parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx.compare import ORT_TOL


def _bounded(y: Tensor, low: float, high: float) -> Tensor:
    return torch.maximum(torch.minimum(y, torch.tensor(high)), torch.tensor(low))


def _inverse(y: Tensor) -> Tensor:
    part = y.sigmoid()
    odds = part.clamp(0, 1).clamp(min=0.3) / (1 - part.clamp(0, 1)).clamp(min=0.2)
    return odds.log() + part.clamp(0, 1).clamp(min=0.45)


def _three(y: Tensor) -> Tensor:
    first = y.clamp(0, 1).clamp(min=0.5) + y.clamp(-1.0, 0.7).clamp(max=0.6) * 2
    return first + y.clamp(0.1, 0.9).clamp(0.4, 0.8)


def _least(y: Tensor) -> Tensor:
    half, fifth = torch.tensor(0.5), torch.tensor(0.2)
    return y.minimum(half).minimum(half + 1) + y.minimum(fifth).minimum(half)


def _hard(y: Tensor, most: float) -> Tensor:
    return F.hardtanh(y, -1, most)


def _part(y: Tensor) -> Tensor:
    return y.clamp(0, 1).clamp(min=0.3)


CLIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverse sigmoids": _inverse,
    "three clips": _three,
    "least and most": lambda y: _bounded(y, 0.1, 0.5) + _bounded(y, -0.3, 0.25),
    "the least of three": _least,
    "relu6 of hardtanh": lambda y: (
        F.relu6(F.hardtanh(y, -1, 0.6)) + F.relu6(F.hardtanh(y, -1, 0.3))
    ),
    "two clips and a relu": lambda y: y.clamp(-1.0, 2.0).relu() + y.clamp(-1.0, 1.5).relu() * 3,
    "the same bounds twice": lambda y: (
        y.clamp(0, 1).clamp(min=0.3) - y.clamp(0, 1).clamp(min=0.3) * 2
    ),
}


class Clipped(nn.Module):
    """A clip between two layers."""

    def __init__(self, clip: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.clip(self.first(x)))
        return result


@pytest.mark.parametrize("name", CLIPS)
def test_clips_of_one_value_have_bounds_of_their_own(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Clipped(CLIPS[name]).eval(), torch.randn(2, 8)
    report = lora_fx.export(model, tmp_path / "m.onnx", (x,), provider="cpu")
    assert max(p.rel for p in report.parity) < ORT_TOL
