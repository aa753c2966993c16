"""Steps in parts, in bfloat16, clipped: the loss and the gradients that they should have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.tensors import device_of
from lora_fx.fx.train.learning_rate import factor
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.objective import UNKNOWN, Objective, objective
from lora_fx.fx.train.settings import Saving, Settings
from tests.fx.train.test_loop import Net, adapted, table
from tests.fx.train.two_processes import Tokens, token_model, tokens

S = Settings(steps=30, lr=0.03, batch_size=13, checks=3)


@pytest.mark.parametrize("parts", [2, 5, 50])
def test_a_step_in_parts_is_the_whole_step(parts: int) -> None:
    one, many = adapted(), adapted()
    whole = fit(one, table(60), table(30, 1), settings=S)
    report = fit(many, table(60), table(30, 1), settings=replace(S, accumulate=parts))
    assert max(abs(a - b) for a, b in zip(whole.losses, report.losses, strict=True)) < 1e-6
    assert report.validation == pytest.approx(whole.validation, abs=1e-6)
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


@pytest.mark.parametrize("loss", ["own", "own, untrained", "ours"])
def test_labels_count_not_examples(loss: str) -> None:
    data, net = tokens(), Tokens()
    if loss == "own, untrained":  # with equal scores, any mean over any labels is the same
        nn.init.zeros_(net.head.weight)
        nn.init.zeros_(net.head.bias)
    model = token_model(net)
    if loss == "ours":  # a label a token, of which those of padding are left out
        data = Table({"input_ids": data.columns["input_ids"], "y": data.columns["labels"]}, "y")
    made, warnings = objective(model, data, "ce", False)
    assert made.counts == ("labels" if loss == "ours" else "next") and not warnings
    held = data.rows(np.arange(20))
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(held.columns["input_ids"]))["logits"]
    labels = torch.from_numpy(held.columns[held.label])
    if loss != "ours":
        logits, labels = logits[:, :-1], labels[:, 1:]
    want = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert made.mean(held, 3) == pytest.approx(want, abs=1e-6)
    whole = fit(model, data, settings=replace(S, batch_size=6))
    report = fit(token_model(net), data, settings=replace(S, batch_size=6, accumulate=4))
    assert report.losses == pytest.approx(whole.losses, abs=1e-6)


class Masked(Tokens):
    """Takes a mask, as models of transformers do."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        return super().forward(input_ids, labels)


def masked_model() -> Any:
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.ones(3, 8, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    return lora_fx.insert(Masked().eval(), (), inputs, rank=2, include="fc")


def test_a_part_of_texts_is_as_long_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    mask = (np.arange(9) < np.array([9, 2, 5, 8, 3, 4, 7, 6])[:, None]).astype(np.int64)
    ids = rng.integers(0, 9, mask.shape)
    columns = {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask, ids, -100)}
    data = Table(columns, "labels")
    shapes: list[tuple[int, ...]] = []
    loss = Objective.loss

    def counted(self: Objective, batch: Table) -> torch.Tensor:
        if device_of(self.model).type != "meta":  # where the memory of a step is estimated
            shapes.append(batch.columns["input_ids"].shape)
        return loss(self, batch)

    monkeypatch.setattr(Objective, "loss", counted)
    settings = replace(S, steps=3, batch_size=8, checks=1)
    whole = fit(masked_model(), data, settings=settings)
    assert set(shapes) == {(8, 9)}

    shapes.clear()
    parts = fit(masked_model(), data, data, settings=replace(settings, accumulate=4))
    by_length = [(2, 3), (2, 5), (2, 7), (2, 9)]
    assert shapes == by_length * 5, "the steps, and a validation before and behind them"
    assert parts.losses == pytest.approx(whole.losses, abs=1e-6)


class Branch(Net):
    """Takes another path for one example."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor
    ) -> torch.Tensor:
        logits: torch.Tensor = self.fc2(torch.tanh(self.fc1(x)))
        return logits * 100 if x.shape[0] == 1 else logits


def test_no_part_is_smaller_than_the_model_takes() -> None:
    losses = []
    for parts in (1, 9):
        model = lora_fx.insert(Branch().eval(), (torch.randn(4, 8),), rank=2)
        assert ("x", 0) in execution_of(model).not_one
        s = replace(S, steps=6, batch_size=9, accumulate=parts)
        losses.append(fit(model, table(20), settings=s).losses)  # batches of 9, 9 and 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_moving_statistics_are_refused() -> None:
    model = adapted(norm_stats="update")
    with pytest.raises(LoraFxError, match="running statistics would depend"):
        fit(model, table(), settings=replace(S, accumulate=2))
    with pytest.raises(LoraFxError, match="no state keeps them"):
        fit(model, table(), settings=S, saving=Saving("state"))
    assert len(fit(model, table(), settings=replace(S, steps=1)).losses) == 1


class Odd(Tokens):
    """Its own loss is a sum."""

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        out = super().forward(input_ids, labels)
        return {"loss": out["logits"].square().sum(), "logits": out["logits"]}


def test_a_loss_that_is_not_known_is_said() -> None:
    args = (torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long))
    model = lora_fx.insert(Odd().eval(), args, rank=2, include="fc")
    said = fit(model, tokens(), settings=replace(S, steps=1, accumulate=2)).warnings
    assert UNKNOWN in said
    assert UNKNOWN not in fit(model, tokens(), settings=replace(S, steps=1)).warnings


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted(), set()
    whole = fit(adapted(), table(), table(60, 1), settings=S)

    def loss(out: Any, labels: Any) -> torch.Tensor:
        seen.add((out["logits"].dtype, torch.is_autocast_enabled("cpu")))
        return nn.functional.cross_entropy(out["logits"].float(), labels)

    data = table()
    data = Table({"x": data.columns["x"], "y": data.columns["labels"]}, "y")
    half = replace(S, mixed_precision="bf16")
    report = fit(model, data, loss=loss, settings=half)
    assert seen == {(torch.bfloat16, True)} and not torch.is_autocast_enabled("cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    worst = max(abs(a - b) for a, b in zip(whole.losses, report.losses, strict=True))
    assert 1e-5 < worst < 30 * 2**-8, worst  # bfloat16 has 8 bits, and a step builds on the last
    own = fit(adapted(), table(), settings=half)
    assert own.losses == pytest.approx(report.losses, abs=2**-6)


def test_clipping_and_decay_reach_the_optimizer() -> None:
    free = fit(adapted(), table(), settings=replace(S, clip=0.0, weight_decay=0.0))
    long = fit(adapted(), table(), settings=replace(S, clip=1e9, weight_decay=0.0))
    assert free.losses == long.losses
    norms = {}
    for clip in (0.0, 1e-3):
        model = adapted()
        fit(model, table(), settings=replace(S, clip=clip, steps=1))
        norms[clip] = nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.requires_grad]
        )
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3) and norms[0.0] > 1e-2
    decayed = fit(adapted(), table(), settings=replace(S, clip=0.0, weight_decay=5.0))
    assert decayed.losses != free.losses


def test_the_rate() -> None:
    rates = [factor(i, 100, 0.1) for i in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert factor(0, 100, 0.0) == 1 and factor(0, 1, 0.0) == 1
