"""Zeros are no difference, and a row is judged by the numbers of its output, not by its own.

On e646dca an output of zeros at one size was "rel inf" in every verb, and mode batch was refused
for a row of small numbers, as a classifier of two labels has them (2.7e-5 of its own largest).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.compare import compare
from lora_fx.errors import LoraFxError
from tests.trust.tied import values

Forward = Callable[[Any, Tensor], Any]
ZEROS: dict[str, Forward] = {
    "a second output": lambda m, x: (m(x), torch.zeros_like(x)),
    "a loss that is off": lambda m, x: {"y": m(x), "aux": m(x).sum() * 0.0},
    "a branch that is closed": lambda m, x: (m(x), torch.relu(m(x) - 1e4)),
    "at two rows": lambda m, x: m(x) * (torch.arange(x.shape[0])[:, None] > 1),
    "at one of two sizes": lambda m, x: m(x) * float(x.shape[0] > 2),
    "the first row": lambda m, x: m(x) * (torch.arange(x.shape[0])[:, None] > 0),
}


class Net(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self.net, x)


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_are_no_difference(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(ZEROS[name]).eval(), torch.randn(4, 8)
    module = lora_fx.insert(model, (x,), rank=2)
    adapter = values(module.updates)
    module.load_adapter(adapter)
    assert lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    assert lora_fx.export(
        model, tmp_path / "s.onnx", (x,), mode="switch", adapters={"s": adapter}, provider="cpu"
    )
    lora_fx.export(model, tmp_path / "b.onnx", (x,), provider="cpu")
    report = lora_fx.merge(tmp_path / "b.onnx", adapter, tmp_path / "n.onnx", run=True)
    assert report.parity


@pytest.mark.parametrize("labels", [1, 2, 3, 4, 5])
def test_a_row_of_small_numbers(labels: int, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config = ViTConfig(**small, image_size=8, patch_size=4, num_labels=labels)
    cap = lora_fx.capture(ViTForImageClassification(config).eval(), (torch.randn(2, 3, 8, 8),))
    adapters = []
    for seed in range(2):
        module = lora_fx.insert(cap, rank=2, seed=seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in module.parameters():
                if p.requires_grad:
                    p.normal_()
        adapters.append(module.adapter())
    assert lora_fx.export(cap, tmp_path / "b.onnx", adapters=adapters, mode="batch", provider="cpu")


def test_what_is_zero_everywhere_or_on_one_side_proves_nothing(tmp_path: Path) -> None:
    model, x = Net(lambda m, x: m(x) * 0.0).eval(), torch.randn(4, 8)
    with pytest.raises(LoraFxError):
        lora_fx.export(model, tmp_path / "m.onnx", (x,), provider="cpu")
    assert not list(tmp_path.iterdir())
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert not compare({"y": ones}, {"y": zeros}, {}, 1e-3).ok
    assert not compare({"y": zeros}, {"y": ones}, {}, 1e-3).ok
    assert not compare({"y": zeros[:1]}, {"y": zeros}, {}, 1e-3).ok
