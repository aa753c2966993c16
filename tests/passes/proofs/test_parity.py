"""What the gates of a proof are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.compare import compare_fairly
from lora_fx.passes.proofs import parity
from lora_fx.passes.proofs.parity import own_errors


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


@pytest.mark.parametrize(("width", "moves"), [(1, 12), (64, 3)])
def test_few_numbers_are_moved_more_often(
    width: int, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three draws of one number tell little of how far it may be moved."""
    seen, real = [], parity._move

    def move(model: Any, other: Any, seed: int) -> None:
        seen.append(seed)
        real(model, other, seed)

    monkeypatch.setattr(parity, "_move", move)
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

        found = compare_fairly(ours, reference, {}, {"y": 2e-6}, own)
        assert seen == asked
        assert found.tol == pytest.approx(gate)
        assert found.ok is (gate > 5e-6)


@pytest.mark.parametrize(
    ("names", "gate"),
    [
        (("present.0.key", "present.1.key"), 8.1e-6),
        (("present.0.key", "present.1.value"), 8.1e-6),
        (("logits", "hidden_states.2"), 8.1e-6),
        (("hidden_states.2", "logits"), 2e-6),  # the end is not on the way to another
        (("output", "output_1"), 2e-6),  # a tuple's parts are not
        (("block1", "block2"), 2e-6),
    ],
)
def test_outputs_of_blocks_share_their_rounding(names: tuple[str, str], gate: float) -> None:
    ours = dict.fromkeys(names, np.array([1.0]))
    reference = {names[0]: np.array([1.0]), names[1]: np.array([1.0 + 5e-6])}
    own = {names[0]: 2e-6, names[1]: 1e-7}
    found = compare_fairly(ours, reference, {}, dict.fromkeys(names, 2e-6), lambda: [own])
    assert (found.output, found.ok) == (names[1], gate > 5e-6)
    assert found.tol == pytest.approx(gate)


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
