"""A plain training loop: AdamW, warm-up and cosine, validation, the best adapter kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.data import Buckets, Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.adapted import AdaptedModule
from lora_fx.fx.tensors import from_numpy

IGNORED = -100
"""A label that torch's cross entropy leaves out."""
Loss = Callable[[Any, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What `fit` may be told. `steps` overrides `epochs`; validation runs `checks` times."""

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    checks: int = 10
    seed: int = 0


@dataclass
class TrainReport:
    """Losses by step, and what was kept: the adapter in the model is that of `best_step`."""

    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For report files."""
        return {
            "losses": [round(x, 6) for x in self.losses],
            "validation": {str(k): round(v, 6) for k, v in self.validation.items()},
            "best_step": self.best_step,
        }


def loss_function(name: str | Loss, label: str, accepts: Callable[[str], bool]) -> tuple[Loss, str]:
    """(loss, argument that carries the labels into the model; empty where the loss takes them).

    `ce` and `mse` use the model's own loss where it takes the label column as an argument and
    returns one.
    """
    if callable(name):
        return name, ""
    if name not in ("ce", "mse"):
        raise LoraFxError(f"no loss {name!r}", "ce, mse or module:function")
    own = label if label and accepts(label) else ""

    def loss(out: Any, labels: torch.Tensor | None) -> torch.Tensor:
        found = _field(out, "loss")
        if own and isinstance(found, torch.Tensor):
            return found
        scores = _scores(out)
        if labels is None:
            raise LoraFxError("the data has no label column", "name it with --label")
        if name == "mse" and scores.squeeze(-1).shape != labels.squeeze(-1).shape:
            raise LoraFxError(
                f"the model gives {list(scores.shape)}, the labels are {list(labels.shape)}",
                "mse needs a label for every output",
            )
        if name == "mse":
            return nn.functional.mse_loss(scores.squeeze(-1).float(), labels.squeeze(-1).float())
        return _cross_entropy(scores, labels)

    return loss, own


def _scores(out: Any) -> torch.Tensor:
    """`.logits`, else the first tensor that comes out."""
    scores = _field(out, "logits")
    if isinstance(scores, torch.Tensor):
        return scores
    return next(t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))


def _field(out: Any, name: str) -> Any:
    return out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)


def _cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    check_labels(labels, scores.shape[-1])
    return nn.functional.cross_entropy(scores.flatten(0, -2).float(), labels.flatten().long())


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Refuse labels that are no class of the model; -100 stands for "ignore"."""
    if labels.is_floating_point():
        raise LoraFxError(
            f"the labels are fractions such as {float(labels.flatten()[0]):g}; ce needs classes",
            "--loss mse fits numbers",
        )
    wrong = labels[(labels >= classes) | ((labels < 0) & (labels != IGNORED))]
    if wrong.numel():
        raise LoraFxError(
            f"label {int(wrong.max())}, but the model scores {classes} classes, 0 to {classes - 1}",
            "build the model with as many labels as the data has",
        )


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
        LoraFxError: A column that the model does not take, or a loss that is not finite: the
            message names the step and the first tensor whose gradient is not.
    """
    s = settings or Settings()
    steps = s.steps or max(1, math.ceil(s.epochs * len(training) / s.batch_size))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay)
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
    if validation is None or not len(validation):
        report.warnings.append("no validation data: the last adapter is kept, not the best")
    best, kept = math.inf, model.adapter()
    every = max(1, steps // max(1, s.checks))
    torch.manual_seed(s.seed)
    step, epoch = 0, 0
    while step < steps:
        for batch in training.batches(s.batch_size, s.seed + epoch):
            model.train()
            value = _loss(model, batch, compute, own)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            step += 1
            _finite(model, value, step)
            nn.utils.clip_grad_norm_(trained, s.clip)
            optimizer.step()
            schedule.step()
            report.losses.append(float(value.detach()))
            if progress is not None:
                progress(step, steps, report.losses[-1])
            if validation is not None and len(validation) and (step % every == 0 or step == steps):
                held = evaluate(model, validation, compute, own, s.batch_size)
                report.validation[step] = held
                if not math.isfinite(held):
                    raise _not_finite(step, "validation loss", held, "the held-out examples")
                if held < best:
                    best, kept, report.best_step = held, model.adapter(), step
            if step == steps:
                break
        epoch += 1
    if report.best_step and report.best_step != steps:
        model.load_adapter(kept)
    report.best_step = report.best_step or steps
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
    scores = _scores(out)
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


def _finite(model: AdaptedModule, value: torch.Tensor, step: int) -> None:
    if bool(torch.isfinite(value)):
        return
    bad = next(
        (
            n
            for n, p in model.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ),
        "the inputs or the base model",
    )
    raise _not_finite(step, "loss", float(value.detach()), bad)


def _not_finite(step: int, what: str, value: float, where: str) -> LoraFxError:
    return LoraFxError(
        f"step {step}: the {what} is {value}; first not finite: {where}",
        "a lower --lr, or look at the data",
        exit_code=1,
    )
