"""Accelerate around the module that insert returns: the numbers of the plain loop."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.fx.attach.attached import adapter_gap, gap
from tests.fx.train.loops import ROWS, Rows, fresh_accelerator, optimizer_of, tied
from tests.test_samples import SAMPLES

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures(fresh_accelerator.__name__)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STEPS, EVERY, NORM = 8, 2, 0.5


def plain(model: nn.Module, data: Rows, dtype: torch.dtype | None = None) -> list[float]:
    """The loop by hand: gradients of EVERY batches, clipped; steps 0, 2, …"""
    optimizer, losses = optimizer_of(model.train()), []
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(STEPS):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(**data.batch(step)).loss
        (loss / EVERY).backward()
        losses.append(float(loss.detach()))
        if step % EVERY == EVERY - 1:
            nn.utils.clip_grad_norm_(trained, NORM)
            optimizer.step()
            optimizer.zero_grad()
    return losses


class Prepared:
    """A loop of accelerate, step by step."""

    def __init__(self, model: nn.Module, data: Rows, **options: Any) -> None:
        fresh = accelerate.state.AcceleratorState._reset_state
        fresh(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=EVERY, **options
        )
        data.columns.pop("junk", None)
        loader = torch.utils.data.DataLoader(data, batch_size=ROWS)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model.train(), optimizer_of(model), loader
        )

    def run(self, steps: Iterable[int]) -> list[float]:
        losses, wanted = [], set(steps)
        for step, batch in enumerate(self.loader):
            if step not in wanted:
                continue
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), NORM)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_losses_of_the_plain_loop(precision: str) -> None:
    model, hand = copy.deepcopy(tied()[1]), copy.deepcopy(tied()[1])
    dtype = torch.bfloat16 if precision == "bf16" else None
    want = plain(hand, Rows(labels=0), dtype)
    prepared = Prepared(model, Rows(labels=0), mixed_precision=precision)
    got = prepared.run(range(STEPS))
    assert max(abs(a - b) for a, b in zip(want, got, strict=True)) < 1e-5
    assert want[0] - want[4] > 0.01, "batch 4 is batch 0 after two steps"
    whole = prepared.accelerator.unwrap_model(prepared.model)
    assert adapter_gap(whole.adapter(), hand.adapter()) < 1e-6
    trained = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    start = dict(tied()[1].named_parameters())
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(not torch.equal(p, start[n]) for n, p in trained.items())
    kwargs = {"input_ids": Rows(labels=0).batch(0)["input_ids"]}
    own = prepared.accelerator.unwrap_model(prepared.model, keep_fp32_wrapper=False)
    assert gap(own.eval()(**kwargs), hand.eval()(**kwargs)) < 1e-5, "without its wrapper too"


def test_states_of_a_tied_model(tmp_path: Path) -> None:
    """save_state writes the whole model, tied or not, and a run goes on from it."""
    model, resumed = copy.deepcopy(tied()[1]), copy.deepcopy(tied()[1])
    data, half = Rows(labels=0), STEPS // 2
    first = Prepared(model, data)
    first.run(range(half))
    first.accelerator.save_state(str(tmp_path / "state"))
    want = first.run(range(half, STEPS))
    second = Prepared(resumed, data)
    second.accelerator.load_state(str(tmp_path / "state"))
    assert second.run(range(half, STEPS)) == want
    assert adapter_gap(resumed.adapter(), model.adapter()) == 0.0
    assert not torch.equal(
        resumed.transformer.h[0].attn.c_attn.lora_B.weight,
        tied()[1].transformer.h[0].attn.c_attn.lora_B.weight,
    )


@pytest.mark.slow
def test_the_sample_in_two_processes(tmp_path: Path) -> None:
    """The same adapter after resuming, and states without the base."""
    done = subprocess.run(
        [*TORCHRUN, str(SAMPLES / "accelerate_loop.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "the state: adapter, optimizer.bin, random_states_0.pkl, random_states_1" in done.stdout
    assert "the resumed run gives the same adapter: True" in done.stdout
