"""Choices that rounding turns: what they are compared by, and what no gate may hide beside them.

On 1358f462 an update that is 2 % too large passes wherever a measure of rounding turns a choice,
and models that suppress boxes of near-equal scores are refused by insert, attach and export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Choice, Gate, Outputs, nearest_choice, tied
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.passes.proofs.reference import Choices, Run, Shown
from lora_fx.passes.proofs.run_comparison import compared
from lora_fx.passes.verbs import export_merged
from tests.trust.test_rounding import CHOICES, Scores, Unseen, adapted, other_first

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
            patch.setattr(export_merged, "fold", lambda _, wrong=wrong: wrong)
            with pytest.raises(NoEffectError, match="the fold differs"):
                lora_fx.export(module, tmp_path / "wrong.onnx", provider="cpu")


def boxes_of(count: int) -> Tensor:
    """Boxes that lie in a row, each over some beside it, no two of them as far."""
    number = torch.arange(float(count))[:, None]
    at = number + 0.2 * torch.sin(number * number)
    return torch.cat([at, torch.zeros_like(at), at + 3, torch.ones_like(at)], 1)


COUNT = 30
NEAR = torch.linspace(1, 1 + 1e-6, COUNT)[torch.randperm(COUNT, generator=torch.manual_seed(0))]
OTHER = NEAR.flip(0)
FAR = torch.linspace(1, 2, COUNT)


@pytest.mark.parametrize(
    ("ours", "theirs", "alike"),
    [
        (nms(boxes_of(COUNT), OTHER, 0.3), nms(boxes_of(COUNT), NEAR, 0.3), True),
        (nms(boxes_of(COUNT), OTHER, 0.1), nms(boxes_of(COUNT), NEAR, 0.1), True),
        (nms(boxes_of(COUNT), NEAR, 0.1), nms(boxes_of(COUNT), NEAR, 0.3), False),
        (nms(boxes_of(COUNT), NEAR, 0.6), nms(boxes_of(COUNT), NEAR, 0.3), False),
        (nms(boxes_of(COUNT), OTHER, 0.3)[:-1], nms(boxes_of(COUNT), NEAR, 0.3), False),
        (torch.tensor([0, 1]), nms(boxes_of(COUNT), NEAR, 0.3), False),
        (torch.tensor([0, 0]), nms(boxes_of(COUNT), NEAR, 0.3), False),
        (torch.tensor([COUNT]), nms(boxes_of(COUNT), NEAR, 0.3), False),
        (torch.tensor([], dtype=torch.int64), nms(boxes_of(COUNT), NEAR, 0.3), False),
    ],
)
def test_boxes_that_near_equal_scores_suppress(ours: Tensor, theirs: Tensor, alike: bool) -> None:
    among = [boxes_of(COUNT).numpy(), NEAR.numpy()]
    assert tied(ours.numpy(), theirs.numpy(), among) is alike
    assert tied(theirs.numpy(), ours.numpy(), among) is alike
    listed = Choice(
        np.stack([0 * ours.numpy(), 0 * ours.numpy(), ours.numpy()], 1),
        {"boxes": among[0][None], "scores": among[1][None, None]},
    )
    kept = Choice(theirs.numpy(), {"b": among[0], "s": among[1]})
    assert nearest_choice(listed, {"kept": kept}) == ("kept" if alike else "")
    assert listed.pairs(kept) == {"b": "boxes", "s": "scores"}


def test_scores_that_are_apart_suppress_in_one_order() -> None:
    boxes = boxes_of(COUNT)
    right, wrong = (nms(boxes, s, 0.3).numpy() for s in (FAR, FAR.flip(0)))
    assert not tied(wrong, right, [boxes.numpy(), FAR.numpy()])


def _kept(m: Any, hidden: Tensor, scores: Tensor) -> Any:
    boxes = boxes_of(scores.shape[1]) + m.head(hidden[0])[:, :4] * 1e-3
    kept = nms(boxes, scores[0], 0.3)
    return m.head(hidden[0])[kept] * (1 + kept[:, None]), kept


def _kept_by_class(m: Any, hidden: Tensor, scores: Tensor) -> Any:
    values = m.head(hidden[0])
    classes = torch.arange(scores.shape[1]) % 3
    boxes = boxes_of(scores.shape[1]) / 3 + values[:, :4] * 1e-3 + 40 * classes[:, None]
    kept = nms(boxes, scores[0], 0.3)[:5]
    return values[kept], scores[0][kept], classes[kept]


SUPPRESSIONS = {"boxes": _kept, "boxes by class": _kept_by_class}


@pytest.mark.parametrize("name", SUPPRESSIONS)
def test_suppressed_boxes_are_compared_by_their_scores(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Scores(SUPPRESSIONS[name]).eval(), torch.randn(1, 3, 8)
    module, adapter = adapted(model, x, size=1.0)
    lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    path, adapters = tmp_path / "s.onnx", {"a": adapter}
    lora_fx.export(model, path, (x,), mode="switch", adapters=adapters, provider="cpu")
    head = next(key for key in adapter.lowrank if key.startswith("head"))
    update = adapter.lowrank[head]
    for factor in (0.0, 1.005):
        changed = replace(update, b=update.b * np.float32(factor))
        wrong = lora_fx.fold(model, (x,), adapter=Adapter({**adapter.lowrank, head: changed}))
        with monkeypatch.context() as patch:
            patch.setattr(export_merged, "fold", lambda _, wrong=wrong: wrong)
            with pytest.raises(NoEffectError, match="the fold differs"):
                lora_fx.export(module, tmp_path / "wrong.onnx", provider="cpu")


@pytest.mark.parametrize("kind", [Scores, Unseen])
@pytest.mark.parametrize("name", SUPPRESSIONS)
def test_a_live_model_that_suppresses_boxes(
    name: str, kind: type[Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = kind(SUPPRESSIONS[name]).eval(), torch.randn(1, 3, 8)
    lora_fx.attach(model, (x,), rank=2, include="*", dead="drop")
    lora_fx.detach(model)
    for wrong in (0.0, 0.99, 1.01):
        with monkeypatch.context() as patch:
            other_first(patch, wrong)
            with pytest.raises(LoraFxError, match="differs from the reference"):
                lora_fx.attach(model, (x,), rank=2, include="*", dead="drop")
