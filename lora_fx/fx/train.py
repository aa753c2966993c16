"""A plain training loop: AdamW, warm-up and cosine, validation, the best adapter kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.data import Buckets, Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.adapted import AdaptedModule
from lora_fx.fx.tensors import from_numpy
from lora_fx.fx.train_finite import check_step, not_finite
from lora_fx.fx.train_loss import IGNORED, Loss, check_labels, loss_function, scores_of
from lora_fx.fx.train_report import TrainReport

NO_VALIDATION = (
    "no validation data: overfitting would not be seen, and the last adapter is kept, not the best"
)


@dataclass(frozen=True)
class Settings:
    """What `fit` may be told. `steps` overrides `epochs`; validation runs `checks` times.

    `patience` is the number of validations in a row without a new lowest loss that end the run.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    checks: int = 10
    seed: int = 0
    patience: int | None = None


def fit(
    model: AdaptedModule,
    training: Table | Buckets,
    validation: Table | None = None,
    loss: str | Loss = "ce",
    settings: Settings | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainReport:
    """Train a model's adapter; afterwards it holds the best one by validation loss.

    Args:
        model: From insert; only what requires grad moves.
        training: Columns by argument name, and the label.
        validation: Held-out examples; without them the last adapter is kept, and that is said.
        loss: ce, mse, or a function of (output, labels).
        settings: Steps, learning rate and so on.
        progress: Called as (step, steps, loss).

    Raises:
        LoraFxError: A column that the model does not take, patience without validation, or a
            loss or gradient that is not finite: the message names the step and the first target
            whose gradient is not, and no weight has moved in that step.
    """
    s = settings or Settings()
    steps = s.steps or max(1, math.ceil(s.epochs * len(training) / s.batch_size))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(model.parameter_groups(s.lr, s.weight_decay))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps, s.warmup))
    signature = model.captured.signature
    known = signature.keywords
    for name in training.columns:
        if name != training.label and name not in known and not signature.open:
            raise LoraFxError(
                f"the model takes no argument {name!r}", f"it takes {', '.join(sorted(known))}"
            )
    compute, own = loss_function(loss, training.label, lambda n: n in known)
    report = TrainReport()
    if loss == "ce":
        report.warnings += _heed_classes(model, training)
    held_out = validation if validation is not None and len(validation) else None
    if held_out is None:
        report.warnings.append(NO_VALIDATION)
        if s.patience is not None:
            raise LoraFxError(
                f"patience {s.patience}, but no example is held out", "--validation 0.1 is usual"
            )
    else:
        report.before = evaluate(model, held_out, compute, own, s.batch_size)
    best, kept, waited = math.inf, model.adapter(), 0
    every = max(1, steps // max(1, s.checks))
    torch.manual_seed(s.seed)
    step, epoch = 0, 0
    while step < steps and report.stopped is None:
        for batch in training.batches(s.batch_size, s.seed + epoch):
            model.train()
            value = _loss(model, batch, compute, own)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            step += 1
            report.losses.append(float(value.detach()))
            gradients = [p.grad for p in trained if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            check_step(model, report.losses[-1], float(norm), step)  # clipping would spread a nan
            nn.utils.clip_grads_with_norm_(trained, s.clip, norm)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step, steps, report.losses[-1])
            if held_out is not None and (step % every == 0 or step == steps):
                held = evaluate(model, held_out, compute, own, s.batch_size)
                report.validation[step] = held
                if not math.isfinite(held):
                    raise not_finite(
                        step,
                        "validation loss",
                        held,
                        "look at the held-out examples",
                    )
                waited += 1
                if held < best:
                    best, kept, report.best_step, waited = held, model.adapter(), step, 0
                if waited == s.patience and step < steps:
                    report.stopped = step
            if step == steps or report.stopped is not None:
                break
        epoch += 1
    if report.best_step and report.best_step != step:
        model.load_adapter(kept)
    report.best_step = report.best_step or steps
    if report.before is not None and not best < report.before:
        report.warnings.append(
            f"the lowest validation loss is {best:.4f}, before training it was "
            f"{report.before:.4f}: the adapter makes the model no better"
        )
    model.eval()
    return report


def _heed_classes(model: AdaptedModule, training: Table | Buckets) -> list[str]:
    """Check one label an example against the model's scores, before any step; returns warnings."""
    tables = training.tables if isinstance(training, Buckets) else [training]
    needed = training.label in model.captured.signature.required
    if needed or tables[0].columns.get(training.label, np.zeros(())).ndim != 1:
        return []
    labels = torch.cat([from_numpy(np.asarray(t.columns[training.label])) for t in tables])
    model.eval()
    with torch.no_grad():
        out = model(**inputs_of(model, tables[0].rows([0, min(1, len(tables[0]) - 1)]).trimmed()))
    scores = scores_of(out)
    if scores.dim() != 2 or scores.shape[1] < 2:
        return []
    check_labels(labels, scores.shape[1])
    used = len(np.unique(labels[labels != IGNORED].numpy()))
    if used < scores.shape[1]:
        return [f"the data has {used} labels, the model scores {scores.shape[1]} classes"]
    return []


def _cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to zero."""
    rise = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return factor


def inputs_of(model: AdaptedModule, batch: Table, own: str = "") -> dict[str, Any]:
    """A batch as the model's arguments, on its device."""
    device = next(model.parameters()).device
    keep = {k: v for k, v in batch.columns.items() if k != batch.label or own}
    return {k: from_numpy(v).to(device) for k, v in keep.items()}


def _loss(model: AdaptedModule, batch: Table, compute: Loss, own: str) -> torch.Tensor:
    labels = batch.columns.get(batch.label)
    device = next(model.parameters()).device
    out = model(**inputs_of(model, batch, own))
    return compute(out, None if labels is None else from_numpy(labels).to(device))


@torch.no_grad()
def evaluate(
    model: AdaptedModule, table: Table, compute: Loss, own: str = "", batch_size: int = 64
) -> float:
    """Mean loss over a table, in eval mode."""
    model.eval()
    total = 0.0
    for batch in table.batches(batch_size):
        total += float(_loss(model, batch, compute, own)) * len(batch)
    return total / len(table)
