"""The proof that insert ends with: dead targets, wrong branches, and what is left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.passes.insert import Insert

X = torch.randn(3, 8)


class Gated(nn.Module):
    """`dead` is multiplied by a gain of zero, as in a block whose last norm starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.dead, self.norm = nn.Linear(8, 6), nn.Linear(8, 6), nn.LayerNorm(6)
        self.gain = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.alive(x) + self.gain * self.dead(x))
        return y


def test_a_dead_target_is_an_error_that_names_it() -> None:
    with pytest.raises(NoEffectError, match=r"no gradient reaches dead\.weight \(eval/train\)"):
        lora_fx.insert(Gated().eval(), (X,), rank=2, include="*")
    m = lora_fx.insert(Gated().eval(), (X,), rank=2)  # nobody asked for it
    assert list(m.updates) == ["alive.weight"]
    assert "dead.weight: left out" in str(m.report())
    assert "gradients reach every target in eval and train" in str(m.report())
    assert len(lora_fx.insert(Gated().eval(), (X,), rank=2, dead="allow").updates) == 2
    with pytest.raises(LoraFxError, match="dead 'no'"):
        lora_fx.insert(Gated().eval(), (X,), dead="no")


def test_a_target_after_which_a_norm_sums_to_a_constant_is_alive() -> None:
    """The gradient of a plain sum through a LayerNorm is rounding; a random cotangent sees it."""
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6, elementwise_affine=False)).eval()
    assert not lora_fx.insert(model, (X,), rank=2).report().effect.dead


def test_dead_in_train_mode_only_is_seen() -> None:
    class OnlyServed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.b(x)
            return self.a(x) + (y.detach() if self.training else y)

    with pytest.raises(NoEffectError, match=r"reaches b\.weight \(train\)"):
        lora_fx.insert(OnlyServed().eval(), (X,), rank=2, include="*")


def test_a_block_that_depth_drops_at_random_is_not_dead() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keep = F.dropout(torch.ones(1), 0.5, self.training)
            return x + self.a(x) + keep * self.b(x)

    assert not lora_fx.insert(Deep().eval(), (X,), rank=2).report().effect.dead


def test_a_region_without_gradients_is_out_of_the_default_plan() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                h = torch.tanh(self.trunk(x))
            y: torch.Tensor = self.head(h)
            return y

    m = lora_fx.insert(Frozen().eval(), (X,), rank=2)
    assert list(m.updates) == ["head.weight"]
    assert "no_grad" in insertion_of(m).found["trunk.weight"].why_not
    with pytest.raises(NoEffectError, match=r"trunk\.weight"):
        lora_fx.insert(Frozen().eval(), (X,), rank=2, include="trunk")


def test_a_wrong_branch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Insert._output_form

    def doubled(self: Any, graph: Any, site: Any, pairs: Any) -> bool:
        twice = [(t, replace(u, alpha=2 * u.alpha)) for t, u in pairs]
        return original(self, graph, site, twice)

    monkeypatch.setattr(Insert, "_output_form", doubled)
    with pytest.raises(NoEffectError, match="branches differ"):
        lora_fx.insert(nn.Linear(8, 6).eval(), (X,), rank=2)


def test_the_proof_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Dropout(0.5)).eval()
    x = torch.randn(2, 4, 9)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    m = lora_fx.insert(model, (x,), rank=2, norm_stats="update")
    assert torch.equal(torch.random.get_rng_state(), before)
    plain = lora_fx.insert(model, (x,), rank=2, norm_stats="update", dead="allow")
    assert not m.training
    for (name, a), (_, b) in zip(m.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert all(p.grad is None for p in m.parameters())


def test_integer_outputs_cannot_be_proven_and_it_is_said() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.argmax(self.fc(x), -1)

    report = str(lora_fx.insert(Picks().eval(), (X,), rank=2).report())
    assert "eval mode is not proven: the model has no output of real or complex numbers" in report


@pytest.mark.parametrize("moves", [True, False])
def test_what_training_moves_beside_the_adapter_is_said(moves: bool) -> None:
    first = nn.Linear(8, 6)
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(first) if moves else first)
    net.append(nn.BatchNorm1d(6)).append(nn.Linear(6, 3))
    module = lora_fx.insert(net, (torch.randn(4, 8),), rank=2)
    told = "training changes 0.parametrizations.weight.0._u" in str(insertion_of(module).effect)
    assert told == moves and ("holds" in str(insertion_of(module).effect)) == moves
