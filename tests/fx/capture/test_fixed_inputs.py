"""A product of a constant and a parameter: a layer on fixed inputs, or what makes a weight."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.fx.module.insertion import insertion_of

X = torch.rand(3, 4, 2)


class Points(nn.Module):
    """Random Fourier features of the input's points and of a fixed grid, by one matrix."""

    grid: torch.Tensor

    def __init__(self, given: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.given = given
        self.w = nn.Parameter(torch.randn(2, 6))
        self.lin = nn.Linear(6, 6)
        self.register_buffer("grid", torch.rand(5, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.lin(torch.sin(self.grid @ self.w))
        points = x @ self.w if self.given else F.pad(x, (0, 4))
        return torch.sin(points) @ keys.t()


@pytest.mark.parametrize("given", [True, False])
def test_a_layer_on_a_constant_is_adapted_with_the_others_of_its_weight(given: bool) -> None:
    model = Points(given).eval()
    found = lora_fx.find(model, (X,))
    assert {t.key: len(t.sites) for t in found.targets} == {
        "w": 2 if given else 1,
        "lin.weight": 1,
    }
    module = lora_fx.insert(model, (X,), rank=2, include="*")
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    explicit = copy.deepcopy(model)
    for key, delta in module.adapter().deltas(dtype="float32").items():
        explicit.get_parameter(key).data += torch.from_numpy(delta)
    module.eval()
    with torch.no_grad():
        want = explicit(X)
        assert rel(module(X), want) < 1e-6 and rel(lora_fx.fold(module)(X), want) < 1e-6
        assert rel(model(X), want) > 0.05
    assert not insertion_of(module).effect.dead


def test_what_a_layer_reads_as_its_weight_is_a_computed_weight() -> None:
    class Rotated(Points):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.grid @ self.w[:, :2])

    assert [t.key for t in lora_fx.find(Rotated().eval(), (X,)).targets] == ["w~"]
