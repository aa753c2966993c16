"""Optimizers and schedules by transformers' names, and runs of them that go on from a state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from lora_fx.errors import LoraFxError
from lora_fx.fx.train.learning_rate import SCHEDULES, factor
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.objective import inputs_of
from lora_fx.fx.train.settings import Saving, Settings
from lora_fx.fx.train.torch_optimizers import OPTIMIZERS
from tests.fx.train.test_loop import adapted, table
from tests.fx.train.test_state import Cut, S, cut_at
from tests.fx.train.test_watch import noise

RATES = {"sgd": 0.5, "rmsprop": 0.01, "adagrad": 0.1}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.13])
def test_a_schedule_is_transformers_own(name: str, warmup: float, tmp_path: Path) -> None:
    """In the warm-up it is a step ahead: the first step there moves nothing."""
    arguments = TrainingArguments(str(tmp_path), warmup_steps=warmup)
    steps, rise = 30, 0 if name == "constant" else arguments.get_warmup_steps(30)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=rise, num_training_steps=steps)
    theirs = []
    for _ in range(steps):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [factor(i, steps, warmup, name) for i in range(steps)]
    assert ours[rise:] == pytest.approx(theirs[rise:], abs=1e-12)
    assert rise == (0 if name == "constant" or not warmup else 4)
    if rise and name != "inverse_sqrt":
        assert ours[: rise - 1] == pytest.approx(theirs[1:rise], abs=1e-12) and not theirs[0]
    assert (min(ours) == 1) == (name == "constant" or (name == "constant_with_warmup" and not rise))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_steps_as_trainers_does(name: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), optim=name, weight_decay=0.02)
    s = Settings(
        steps=9, lr=RATES.get(name, 0.03), batch_size=30, warmup=0.0, schedule="linear",
        optimizer=name, weight_decay=0.02,
    )  # fmt: skip
    report = fit(adapted(), table(90), settings=s)
    model = adapted().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    make, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = make(trained, **{**options, "lr": s.lr, "weight_decay": 0.02})
    losses: list[float] = []
    for epoch in range(3):
        for batch in table(90).batches(30, epoch):
            for group in optimizer.param_groups:
                group["lr"] = s.lr * (1 - len(losses) / 9)
            loss = model(**inputs_of(model, batch, "labels"))["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
    assert report.losses == pytest.approx(losses, abs=1e-6)
    assert losses[0] - losses[-1] > 0.02


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_and_keeps_the_last_states(name: str, tmp_path: Path) -> None:
    settings = replace(S, optimizer=name, lr=RATES.get(name, 0.05), schedule="constant")
    whole, folder = adapted(), tmp_path / "states"
    want = fit(whole, noise(), table(60), "ce", settings)
    with pytest.raises(Cut):
        saving = Saving(str(folder), 4, limit=2)
        fit(adapted(), noise(), table(60), "ce", settings, cut_at(15), saving=saving)
    assert {p.name for p in folder.iterdir()} == {"checkpoint-8", "checkpoint-12"}
    model = adapted(seed=9)
    saving = Saving(str(folder), 4, str(folder), limit=2)
    report = fit(model, noise(), table(60), "ce", settings, saving=saving)
    assert report.resumed == 12 and replace(report, resumed=None) == want
    assert {p.name for p in folder.iterdir()} == {"checkpoint-36", "checkpoint-40"}
    for (what, p), q in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), what


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(LoraFxError, match="unknown schedule 'cosin'") as info:
        Settings(schedule="cosin")
    assert info.value.hint.startswith("use cosine, linear")
    with pytest.raises(LoraFxError, match="unknown optimizer 'adam'"):
        Settings(optimizer="adam")
