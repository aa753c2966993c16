"""Attach at the size of language models: memory beside the weights, and proofs in bfloat16."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.attachment import Form
from lora_fx.fx.attach.recording import Program
from lora_fx.ir.einsum import Einsum
from lora_fx.passes.verbs.attach_forms import GraphPlanner


class Wave(nn.Module):
    """A layer that makes more of every difference."""

    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, width, bias=False)
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.gain * self.up(x))


def deep(layers: int, width: int, gain: float = 3) -> nn.Sequential:
    """Layers in bfloat16, after which y + s·b(a x) and (W + s·b·a) x are rounded far apart."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Wave(width, gain) for _ in range(layers))).to(torch.bfloat16)
    return model.eval()


PEAK = """
import torch
import lora_fx
from tests.fx.attach.test_large_models import deep

def resident(of):
    status = open("/proc/self/status").read()
    return int(status.split(of + ":")[1].split()[0])

def attached(model, width):
    lora_fx.attach(model, (torch.randn(2, 3, width, dtype=torch.bfloat16),), rank=1)

attached(deep(1, 8), 8)  # imports
model = deep(32, 1024, 1.5)
weights = sum(w.numel() * w.element_size() for w in model.parameters()) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = resident("VmRSS")
attached(model, 1024)
print((resident("VmHWM") - before) / weights)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_attach_holds_no_second_model() -> None:
    """What is held is the adapter, and W + s·b·a of one of 32 weights at a time."""
    run = [sys.executable, "-W", "ignore", "-c", PEAK]
    share = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert share < 0.4


def attached(model: nn.Module) -> None:
    lora_fx.attach(model, (torch.randn(2, 3, 32, dtype=torch.bfloat16),), rank=2)


def test_a_right_branch_of_a_deep_model_passes_without_its_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No copy of the model is moved by roundings: the live model and the graph round alike."""
    asked: list[object] = []
    monkeypatch.setattr("lora_fx.passes.proofs.torch_rounding.move", lambda *of: asked.append(of))
    attached(deep(16, 32))
    assert not asked


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.5])
def test_a_branch_that_is_wrong_in_the_graph_too_is_found(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = Einsum.branch

    def scaled(self: Einsum, e: Any, site: Any, x: Any, f: Any) -> Any:
        return e.op("mul", branch(self, e, site, x, f), factor)

    monkeypatch.setattr(Einsum, "branch", scaled)
    with pytest.raises(LoraFxError, match="differs from the reference"):
        attached(deep(16, 32))


@pytest.mark.parametrize("path", ["0.up", "7.up", "15.up"])
def test_a_lost_branch_of_one_module_is_found(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = GraphPlanner.forms

    def lost(self: GraphPlanner, *args: Any) -> dict[str, Form]:
        result = forms(self, *args)
        same = Program((), (), (("detach", (1,), ()),))
        return {**result, path: replace(result[path], output=(same, same))}

    monkeypatch.setattr(GraphPlanner, "forms", lost)
    with pytest.raises(LoraFxError, match=f"{path}.weight: the attached model"):
        attached(deep(16, 32))
