"""Layers that a package has quantised keep what the user's code does around them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.compare import FOLD_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.quantised_parameters import forms
from lora_fx.passes.verbs.open import capture


def packed(layer: nn.Linear, groups: int = 1) -> nn.Linear:
    """A layer as compressed-tensors leaves it, which computes with the numbers of its codes."""
    out, inner = layer.weight.shape
    codes = torch.randint(0, 16, (out, inner), dtype=torch.int32)
    words = sum((codes[:, i::8] << (4 * i) for i in range(8)), torch.zeros(out, inner // 8).int())
    scale = torch.rand(out, groups) / 8
    del layer.weight
    layer.weight_packed = nn.Parameter(words, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    layer.weight_shape = nn.Parameter(torch.tensor([out, inner]), requires_grad=False)
    layer.register_buffer(
        "numbers", (codes - 8) * scale.repeat_interleave(inner // groups, 1), persistent=False
    )
    return layer


class Plain(nn.Module):
    """The same model over numbers; what its layer is made of is the first one's."""

    def __init__(self, made: nn.Module) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: torch.Tensor) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Linear, "forward", _forward)
            return self.made(x)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    weight = self.numbers if hasattr(self, "numbers") else self.weight
    return F.linear(x, weight, self.bias)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a = self.b = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(torch.relu(self.a(x)))


def hooked(layer: nn.Linear, *, before: bool) -> nn.Linear:
    if before:
        layer.register_forward_pre_hook(lambda m, xs: (xs[0] * 3,))
    else:
        layer.register_forward_hook(lambda m, xs, y: y * 3)
    return layer


MODELS = {
    "hook": lambda: nn.Sequential(hooked(packed(nn.Linear(64, 8)), before=False), nn.Linear(8, 3)),
    "pre-hook": lambda: nn.Sequential(hooked(packed(nn.Linear(64, 8)), before=True)),
    "two names": lambda: Twice(packed(nn.Linear(64, 64))),
    "the model itself": lambda: packed(nn.Linear(64, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_around_a_layer_is_kept(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().eval(), torch.randn(3, 64)
    want = Plain(copy.deepcopy(model))(x).detach().numpy()
    module = lora_fx.insert(model, (x,), rank=2)
    assert rel(module(x).detach().numpy(), want) < FOLD_TOL
    assert any(t.parameter.format == "int4" for t in lora_fx.find(model, (x,)).targets)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("kind", ["class", "instance"])
def test_a_forward_of_its_own_is_refused(kind: str) -> None:
    layer = packed((Doubled if kind == "class" else nn.Linear)(64, 8))
    if kind == "instance":
        layer.forward = lambda x: x * 2
    with pytest.raises(LoraFxError, match=r"0: this quantised .* has a custom forward"):
        lora_fx.find(nn.Sequential(layer), (torch.randn(3, 64),))


def test_layers_of_packages_that_hold_numbers_are_the_users_own() -> None:
    class StableEmbedding(nn.Embedding):
        __module__ = "bitsandbytes.nn.modules"

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    model, ids = nn.Sequential(StableEmbedding(20, 8), nn.Linear(8, 4)).eval(), torch.arange(6)
    module = lora_fx.insert(model, (ids,), rank=2)
    assert rel(module(ids).detach().numpy(), model(ids).detach().numpy()) < FOLD_TOL


@pytest.mark.parametrize("block", [2, 8, 24, 40])
def test_blocks_that_no_operator_has(block: int, tmp_path: Path) -> None:
    """They are codes in torch, and numbers in the file, which holds the codes."""
    torch.manual_seed(0)
    model, x = nn.Sequential(packed(nn.Linear(240, 8), 240 // block)).eval(), torch.randn(3, 240)
    want = Plain(copy.deepcopy(model))(x).detach().numpy()
    cap = capture(model, (x,))
    (stored,) = forms(cap.model).values()
    assert (stored.format, stored.block) == ("int4", block)
    module = lora_fx.insert(cap, rank=2)
    assert rel(module(x).detach().numpy(), want) < FOLD_TOL
    module.train()(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    report = lora_fx.export(module.eval(), tmp_path / "m.onnx", mode="switch", provider="cpu")
    assert report.ok and max(p.rel for p in report.parity) < 2e-6
