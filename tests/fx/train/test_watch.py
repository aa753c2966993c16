"""What the training loop watches for: losses that are not finite, patience, overfitting."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from lora_fx.data import Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.train.loop import fit
from lora_fx.fx.train.settings import Settings
from lora_fx.fx.train.train_report import TrainReport, verdict
from tests.fx.train.test_loop import adapted, table


class Spoilt(torch.autograd.Function):
    """The identity, with a gradient that is not finite from the third call on."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        Spoilt.calls += 1
        return (grad * ctx.value if Spoilt.calls == 3 else grad), None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_a_weight_moves(value: float) -> None:
    model, moved = adapted(), {}
    Spoilt.calls = 0

    def loss(out: Any, labels: torch.Tensor | None) -> torch.Tensor:
        moved.update({n: p.detach().clone() for n, p in model.named_parameters()})
        scores = Spoilt.apply(out["logits"], value)
        return torch.nn.functional.cross_entropy(scores, labels)  # finite: only its gradient is not

    with pytest.raises(LoraFxError) as info:
        fit(model, table(), loss=loss, settings=Settings(steps=5, lr=0.1))
    assert info.value.exit_code == 1
    assert re.search(r"step 3: the norm of the gradients is (nan|inf)", info.value.message)
    assert "the gradient of A of 'fc1.weight' (4 of 4 are not)" in info.value.message
    assert all(torch.equal(p, moved[n]) for n, p in model.named_parameters())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(("layer", "side"), [("fc1", "B"), ("fc2", "A"), ("fc2", "B")])
def test_the_first_target_that_is_not_finite_is_named(layer: str, side: str) -> None:
    model = adapted()
    p = insertion_of(model).slots()[f"{layer}.weight"][side == "B"]
    p.register_hook(lambda grad: torch.full_like(grad, torch.nan))
    with pytest.raises(LoraFxError, match="step 1: the norm of the gradients is nan") as info:
        fit(model, table(), settings=Settings(steps=5))
    assert f"the gradient of {side} of '{layer}.weight' (1 of 4 are not)" in info.value.message


def test_a_norm_that_overflows_is_said() -> None:
    model = adapted()
    for _, b in insertion_of(model).slots().values():
        b.register_hook(lambda grad: torch.full_like(grad, 1e38))
    with pytest.raises(LoraFxError, match=r"gradients is inf; every gradient is finite"):
        fit(model, table(), settings=Settings(steps=5))


def test_a_whole_tensor_is_named() -> None:
    model = adapted(also_train="fc2.bias")
    named = dict(model.named_parameters())
    name = next(n for n, p in named.items() if p.shape == (3,) and p.requires_grad)
    named[name].register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(LoraFxError, match=r"the gradient of 'fc2\.bias' \(1 of 5"):
        fit(model, table(), settings=Settings(steps=5))


def test_a_validation_loss_that_is_not_finite() -> None:
    held = table(20)
    held.columns["x"][3] = np.nan
    with pytest.raises(LoraFxError, match="step 2: the validation loss is nan") as info:
        fit(adapted(), table(), held, settings=Settings(steps=4, checks=2))
    assert info.value.exit_code == 1


def noise() -> Table:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 8)).astype(np.float32)
    return Table({"x": x, "labels": rng.integers(0, 3, 24)}, "labels")


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_counts_validations_without_a_new_best(patience: int) -> None:
    s = {"steps": 80, "lr": 0.1, "checks": 40}
    whole = fit(adapted(), noise(), table(60), settings=Settings(**s))
    curve, best, waited, want = whole.validation, np.inf, 0, None
    for step, value in curve.items():
        waited = 0 if value < best else waited + 1
        best = min(best, value)
        if waited == patience:
            want = step
            break
    model = adapted()
    report = fit(model, noise(), table(60), settings=Settings(**s, patience=patience))
    assert want is not None and want < 80
    assert report.stopped == want == len(report.losses) == max(report.validation)
    assert report.best_step == min(report.validation, key=lambda k: report.validation[k])
    assert report.validation == {k: v for k, v in curve.items() if k <= want}
    assert report.verdict.endswith(f"; patience ended at step {want}")
    scores = model(x=torch.from_numpy(table(60).columns["x"]))["logits"]
    labels = torch.from_numpy(table(60).columns["labels"])
    held = torch.nn.functional.cross_entropy(scores, labels).item()
    assert held == pytest.approx(report.validation[report.best_step], abs=1e-5)


def test_patience_that_does_not_run_out_changes_nothing() -> None:
    s = {"steps": 20, "lr": 0.01, "checks": 10}
    plain = fit(adapted(), table(), table(60, 1), settings=Settings(**s))
    patient = fit(adapted(), table(), table(60, 1), settings=Settings(**s, patience=9))
    assert patient == plain and patient.stopped is None and "patience" not in patient.verdict


def test_patience_without_validation_is_refused() -> None:
    with pytest.raises(LoraFxError, match="patience 2 needs held-out examples, but there are none"):
        fit(adapted(), table(), settings=Settings(steps=2, patience=2))


@pytest.mark.parametrize(
    ("curve", "kept", "said"),
    [
        ({}, 30, "no validation: overfitting would not be seen; kept the last step, 30"),
        ({1: 0.5}, 1, "one validation, at step 1: no rise or fall can be seen; kept step 1"),
        (
            {10: 2.0, 20: 1.0, 30: 1.2, 40: 1.042},
            20,
            "validation loss rose 4.2 % after step 20; kept step 20",
        ),
        ({10: 0.5, 20: 2.0}, 10, "validation loss rose 300 % after step 10; kept step 10"),
        (
            {10: 1.0, 20: 1.0001},
            10,
            "validation loss rose less than 0.1 % after step 10; kept step 10",
        ),
        ({10: -1.0, 20: -0.5}, 10, "validation loss rose 0.5 after step 10; kept step 10"),
        ({10: 0.5, 20: 0.5}, 10, "validation loss did not fall after step 10; kept step 10"),
        (
            {10: 1.0, 20: 0.8, 30: 0.6},
            30,
            "validation loss still falling at the last step (by 25 % since 20); kept step 30",
        ),
    ],
)
def test_verdicts(curve: dict[int, float], kept: int, said: str) -> None:
    report = TrainReport(validation=curve, best_step=kept)
    assert verdict(curve, kept, None) == said == report.verdict == report.to_json()["verdict"]
    if curve:
        assert verdict(curve, kept, -9.0) == f"{said}, no better than before training"
        assert verdict(curve, kept, 9.0) == said


def test_the_verdict_of_a_run_is_that_of_its_curve() -> None:
    settings = Settings(steps=80, lr=0.1, checks=8)
    report = fit(adapted(), noise(), table(60), settings=settings)
    low, last = report.validation[report.best_step], report.validation[80]
    assert last > low
    rise = f"{100 * (last / low - 1):.0f} %"
    assert report.verdict == (
        f"validation loss rose {rise} after step {report.best_step}; kept step {report.best_step}"
        ", no better than before training"
    )
