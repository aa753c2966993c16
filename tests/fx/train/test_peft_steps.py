"""MiniLM and SmolLM2 beside PEFT's wheel: the same A, batches of 512 tokens, no dropout, fp32.

Two steps of two layers of MiniLM always; the rest by hand:
`pytest -m slow -s tests/fx/train/test_peft_steps.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from beside_peft import Beside, train_both

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.adapted import AdaptedModule
from tests.fx.train.peft_models import (
    Case,
    loss,
    minilm_case,
    predictions,
    runtime_predictions,
    smollm2_case,
    smollm2_cut,
)

TOLERANCE = 1e-4
"""Of a loss, in the first 20 steps."""
DIFFER = 3
"""Held-out examples whose predictions may differ from PEFT's after the last step."""


def trained(case: Case) -> tuple[AdaptedModule, Beside]:
    """Both trained; alpha/rank is 1.5: by a power of two, both would be equal to the bit."""
    adapted = lora_fx.insert(case.model, (), case.example, rank=8, alpha=12.0, **case.options)
    return adapted, train_both(case.model, adapted, case.batches, loss, case.lr)


def check(case: Case) -> tuple[AdaptedModule, np.ndarray]:
    """Losses equal PEFT's step by step, and predictions after the last one."""
    assert case.example["input_ids"].numel() == 512
    before = predictions(case.model, case.held)
    adapted, both = trained(case)
    after = predictions(adapted, case.held)
    theirs = predictions(both.peft, case.held)
    print(
        f"\n{both}\n{(after != before).sum()} of {len(after)} predictions moved, "
        f"{(after != theirs).sum()} differ from PEFT's"
    )
    early = [abs(a - b) for a, b in zip(both.ours[:20], both.theirs[:20], strict=True)]
    assert max(early) < TOLERANCE
    assert len(set(both.ours)) == len(case.batches), "every step has a loss of its own"
    assert (after != before).sum() > DIFFER, "training moved more than may differ"
    assert (after != theirs).sum() <= DIFFER
    return adapted, after


def check_whole(case: Case, path: Path) -> None:
    """The same, and ONNX Runtime predicts what torch does."""
    start = time.perf_counter()
    adapted, after = check(case)
    print(lora_fx.export(adapted, path, provider="cpu"))
    runtime = runtime_predictions(path, case.held)
    print(f"{(runtime == after).sum()} of {len(after)} predictions equal ONNX Runtime's")
    print(f"{time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of CPU in all")
    np.testing.assert_array_equal(runtime, after)


CUTS: dict[str, Callable[[], Case]] = {
    "minilm": lambda: minilm_case(2, steps=2, held=20, probed=32, package="asyncio"),
    "smollm2": lambda: smollm2_cut(2, steps=2, held=1),
}


@pytest.mark.parametrize("name", ["minilm", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_two_steps_of_two_layers(name: str) -> None:
    check(replace(CUTS[name](), lr=1e-2))  # two steps have to move predictions


@pytest.mark.slow
def test_sixty_steps_of_minilm(tmp_path: Path) -> None:
    check_whole(minilm_case(6, steps=60, held=400), tmp_path / "model.onnx")


@pytest.mark.slow
def test_twenty_steps_of_smollm2(tmp_path: Path) -> None:
    try:
        case = smollm2_case(steps=20, held=8)
    except LoraFxError as e:
        pytest.skip(str(e))
    check_whole(case, tmp_path / "model.onnx")
