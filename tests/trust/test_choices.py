"""Choices that rounding turns: what they are compared by, and what no gate may hide beside them.

On 1358f462 an update that is 2 % too large passes wherever a measure of rounding turns a choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Gate, Outputs
from lora_fx.dtypes import Array
from lora_fx.errors import NoEffectError
from lora_fx.passes.proofs.reference import Choices, Run, Shown, compared
from lora_fx.passes.verbs import export_torch
from tests.trust.test_rounding import CHOICES, Scores, adapted

SCORES = np.array([0.5, 0.5, 0.1], np.float32)
VALUES = np.array([3.0, 1.0, 2.0], np.float32)


class Chooser:
    """A model that gives the value of its largest score, of which two are near-equal.

    Args:
        wrong: By how much its values are too large.
        later: Whether the scores are seen where the inputs were moved, and not before.
    """

    def __init__(self, wrong: float, *, later: bool = False) -> None:
        self.factor = np.float32(1 + wrong)
        self.later = later
        self.runs = 0

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Its outputs; inputs that were moved turn the choice."""
        best = 0 if feeds["x"][0] == 1.0 else 1
        return {"y": VALUES[[best]] * self.factor}

    def stepped(self) -> Iterator[Run]:
        """None: see Rerun."""
        return iter(())

    def plain(self) -> Run | None:
        """None: see Rerun."""
        return None

    def choosing(self, choices: Choices) -> Run | None:
        """The same with the choice of the reference."""

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            self.runs += 1
            outputs = {"y": VALUES[choices.values["best"]] * self.factor}
            shown = not self.later or self.runs > 1
            return outputs | ({"scores": SCORES} if shown else {})

        return run


def found(model: Chooser, off: float, own: float) -> bool:
    """Whether a model passes.

    Args:
        model: What is compared with one of the same choice.
        off: By how much its values are too large, and rounding is no more.
        own: How far rounding moves the reference where the choice stays.
    """
    feeds = {"x": np.ones(1, np.float32)}
    outputs = {"y": VALUES[[0]], "scores": SCORES}

    def steady(shown: Shown) -> Iterator[Mapping[str, float]]:
        yield dict.fromkeys(shown(outputs), own)

    def choose() -> Choices:
        return Choices({"best": np.array([0])}, {"best": ("scores",)}, outputs, steady)

    expected: Outputs = {"y": VALUES[[0]]}
    gates = {"y": Gate(2e-6, 1e-3)}
    parity, _ = compared(model, model, feeds, expected, gates, lambda: [], choose, of="")
    return parity.ok


@pytest.mark.parametrize(
    ("wrong", "own", "ok"),
    [
        (0.0, 0.0, True),
        (1e-6, 0.0, True),  # below the first gate
        (1e-5, 1e-5, True),  # rounding, where the choice stays too
        (9e-4, 3e-4, True),  # the worst that rounding can be
        (1e-5, 0.0, False),
        (5e-4, 0.0, False),
        (9e-4, 1e-6, False),
        (9e-4, 1e-4, False),
        (5e-3, 0.0, False),
        (-9e-4, 0.0, False),
        (-1.0, 0.0, False),  # a branch that is lost
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_a_choice_that_turns_when_inputs_move_widens_no_gate(
    later: bool, wrong: float, own: float, ok: bool
) -> None:
    assert found(Chooser(wrong, later=later), wrong, own) is ok


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("seed", range(2))
def test_an_update_that_is_a_little_too_large_is_found_beside_a_choice(
    seed: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(seed)
    model, x = Scores(CHOICES[name]).eval(), torch.randn(2, 3, 8)
    with torch.no_grad():
        model.places.mul_(10)
    module, adapter = adapted(model, x, size=0.05)
    lora_fx.export(module, tmp_path / "right.onnx", provider="cpu")
    head = next(key for key in adapter.lowrank if key.startswith("head"))
    others = {key: update for key, update in adapter.lowrank.items() if key != head}
    update = adapter.lowrank[head]
    changed = [{head: replace(update, alpha=update.alpha * wrong)} for wrong in (0.98, 1.005, 1.02)]
    for entries in ({}, *changed):
        wrong = lora_fx.fold(model, (x,), adapter=Adapter({**others, **entries}))
        with monkeypatch.context() as patch:
            patch.setattr(export_torch, "fold", lambda _, wrong=wrong: wrong)
            with pytest.raises(NoEffectError, match="the fold differs"):
                lora_fx.export(module, tmp_path / "wrong.onnx", provider="cpu")
