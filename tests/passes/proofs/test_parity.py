"""What the gates of a proof are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.compare import Gate, compare_fairly, narrow_gate
from lora_fx.passes.proofs import graph_choices, parity, torch_rounding
from lora_fx.passes.proofs.torch_rounding import own_errors


def all_of(errors: Iterator[dict[str, float]]) -> dict[str, float]:
    *_, last = errors
    return last


def test_one_input_that_rounds_well_does_not_narrow_the_gate() -> None:
    """Zeros have no rounding error at all; the model has."""
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 3, bias=False))
    adapted = lora_fx.insert(m.eval(), (torch.randn(2, 32),), rank=2)
    zeros = {"input": np.zeros((2, 32), np.float32)}
    assert 0 < all_of(own_errors(adapted))["output"] < 1e-6
    assert all_of(own_errors(adapted, zeros)) == all_of(own_errors(adapted))


class Cache(nn.Module):
    """A model that writes into a buffer, and reads all of it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("rows", torch.zeros(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        self.rows[1] = y[0].detach()
        return y + self.rows.sum(0)


def test_what_is_written_into_a_buffer_is_read_in_fp64_too() -> None:
    torch.manual_seed(0)
    adapted = lora_fx.insert(Cache().eval(), (torch.randn(3, 8),), rank=2)
    assert 0 < all_of(own_errors(adapted))["output"] < 1e-6


@pytest.mark.parametrize(("width", "moves"), [(1, 12), (64, 3)])
def test_few_numbers_are_moved_more_often(
    width: int, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three draws of one number tell little of how far it may be moved."""
    seen, real = [], graph_choices.move

    def move(model: Any, other: Any, seed: int) -> None:
        seen.append(seed)
        real(model, other, seed)

    monkeypatch.setattr(torch_rounding, "move", move)
    adapted = lora_fx.insert(
        nn.Sequential(nn.Linear(8, width)).eval(), (torch.randn(2, 8),), rank=1
    )
    assert all_of(own_errors(adapted))["output"] > 0
    assert seen == [*range(moves)]


def test_rounding_is_measured_until_the_gate_is_met() -> None:
    """And no further; where no measure is enough, the difference stands against the widest."""
    ours, reference = {"y": np.array([1.0 + 5e-6])}, {"y": np.array([1.0])}
    for measures, asked, gate in (
        ([1e-7, 2e-6, 9e-6], [1e-7, 2e-6], 8.1e-6),
        ([1e-7, 2e-7], [1e-7, 2e-7], 2e-6),
    ):
        seen: list[float] = []

        def own(measures: list[float] = measures, seen: list[float] = seen) -> Any:
            for error in measures:
                seen.append(error)
                yield {"y": error}

        found = compare_fairly(ours, reference, {}, {"y": Gate(2e-6, 1e-3)}, own)
        assert seen == asked
        assert found.tol == pytest.approx(gate)
        assert found.ok is (gate > 5e-6)


GATE = Gate(2e-6, 1e-3)


@pytest.mark.parametrize(
    ("names", "gate"),
    [
        (("present.0.key", "present.1.key"), 8.1e-6),
        (("present.0.key", "present.1.value"), 8.1e-6),
        (("logits", "hidden_states.2"), 8.1e-6),
        (("hidden_states.2", "logits"), 2e-6),  # the end is not on the way to another
        (("heads.0", "heads.1"), 2e-6),
        (("output", "output_1"), 2e-6),  # a tuple's parts are not
        (("block1", "block2"), 2e-6),
    ],
)
def test_outputs_of_blocks_share_their_rounding(names: tuple[str, str], gate: float) -> None:
    ours = dict.fromkeys(names, np.array([1.0]))
    reference = {names[0]: np.array([1.0]), names[1]: np.array([1.0 + 5e-6])}
    own = {names[0]: 2e-6, names[1]: 1e-7}
    found = compare_fairly(ours, reference, {}, dict.fromkeys(names, GATE), lambda: [own])
    assert (found.output, found.ok) == (names[1], gate > 5e-6)
    assert found.tol == pytest.approx(gate)


@pytest.mark.parametrize(
    ("effect", "own", "off", "ok"),
    [
        (0.5, 2e-3, 7.9e-3, True),  # 8 epsilons are 7.8e-3, and the model itself rounds by 2e-3
        (0.5, 1e-3, 7.9e-3, False),
        (0.5, 9e-2, 3.2e-2, False),  # no further than 32 epsilons
        (0.01, 9e-2, 7.9e-3, False),  # half of what the adapter changes would be lost unseen
        (0.01, 9e-2, 4.9e-3, True),
        (0.0, 3e-3, 1.1e-2, True),  # no adapter, none to lose
    ],
)
def test_a_narrow_gate_widens_below_half_the_effect(
    effect: float, own: float, off: float, ok: bool
) -> None:
    base, expected = np.array([1.0 - effect]), np.array([1.0])
    gate = narrow_gate(2e-6, 2.0**-10, base, expected)
    ours, found = {"y": expected + off}, {"y": own}
    assert compare_fairly(ours, {"y": expected}, {}, {"y": gate}, lambda: [found]).ok is ok


class Rows(nn.Module):
    """Rows by a float number: of no use with random ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(40, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.table[x.long() - 300])


def test_inputs_that_fit_count_where_sampled_ones_do_not() -> None:
    torch.manual_seed(0)
    x = torch.full((2, 4), 303.0)
    adapted = lora_fx.insert(Rows().eval(), (x,), rank=2, include="fc")
    assert 0 < all_of(own_errors(adapted))["output"] < 1e-6  # the example counts
    assert 0 < all_of(own_errors(adapted, {"x": x.numpy()}))["output"] < 1e-6


class ThreeOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.layer(x)
        return y, y.tanh(), y.exp()


def test_the_unadapted_model_runs_once_for_the_gates_of_all_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = ThreeOutputs().bfloat16().eval()
    adapted = lora_fx.insert(model, (torch.randn(2, 8, dtype=torch.bfloat16),), rank=2)
    blocks = 0
    base = type(adapted).base

    def counted(module: Any) -> Any:
        nonlocal blocks
        blocks += 1
        return base(module)

    monkeypatch.setattr(type(adapted), "base", counted)
    results = parity.prove(parity.torch_run(adapted), adapted)
    assert len(results) > 1
    assert blocks == len(results)
