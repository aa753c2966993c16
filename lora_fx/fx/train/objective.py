"""The loss of a batch, in parts: what each part weighs, so that their sum is that of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.data import Buckets, Table
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, expect_name
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.tensors import device_of, from_numpy, has_values
from lora_fx.fx.train.processes import ALONE, Processes

PROBE = 8
"""Examples from which it is found out what the model's own loss is a mean of."""
UNKNOWN = (
    "the model's own loss is no cross entropy over its labels: the parts of a batch count by their "
    "examples"
)

UNLABELLED = "name it with --label; language models take text, prompt and completion, or messages"


@dataclass(frozen=True)
class Objective:
    """What a run makes small.

    Args:
        model: The model.
        compute: The loss of (output, labels), a mean.
        own: The argument that carries the labels into the model; empty where the loss takes them.
        counts: What it is a mean over: examples, labels, or next (labels but an example's first).
        half: Whether products run in bfloat16.
    """

    model: AdaptedModule
    compute: Loss
    own: str = ""
    counts: str = "examples"
    half: bool = False

    def weight(self, batch: Table) -> int:
        """Over how many items the loss of a batch is a mean."""
        labels = batch.columns.get(batch.label)
        if self.counts == "examples" or labels is None:
            return len(batch)
        return int((labels[:, 1:] if self.counts == "next" else labels).__ne__(IGNORED).sum())

    def loss(self, batch: Table) -> torch.Tensor:
        """The mean loss, with its graph, in the mode that the model is in."""
        labels = batch.columns.get(batch.label)
        device = device_of(self.model)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
            out = self.model(**inputs_of(self.model, batch, self.own))
            return self.compute(out, None if labels is None else from_numpy(labels).to(device))

    @torch.no_grad()
    def mean(self, table: Table, batch_size: int, world: Processes = ALONE) -> float:
        """Mean loss over a table, in eval mode; the processes share the batches."""
        self.model.eval()
        total, weight = 0.0, 0.0
        for i, batch in enumerate(table.batches(batch_size)):
            count = self.weight(batch) if i % world.size == world.rank else 0
            if count:
                total, weight = total + float(self.loss(batch)) * count, weight + count
        total, weight = world.total(total, weight)
        return total / weight if weight else math.nan


def objective(
    model: AdaptedModule, training: Table | Buckets, loss: str | Loss, half: bool
) -> tuple[Objective, list[str]]:
    """What a run makes small, and warnings.

    Raises:
        LoraFxError: A column that the model does not take, or a label that is no class of it.
    """
    signature = model.captured.signature
    known = signature.keywords
    for name in training.columns:
        if name != training.label and name not in known and not signature.open:
            raise LoraFxError(
                f"the model takes no argument {name!r}", f"it takes {', '.join(sorted(known))}"
            )
    compute, own = loss_function(loss, training.label, lambda n: n in known)
    labels = training.columns.get(training.label)
    counted = loss == "ce" and labels is not None and labels.dtype.kind in "iu"
    made = Objective(model, compute, own, "labels" if counted else "examples", half)
    warnings = _heed_classes(model, training) if loss == "ce" else []
    if own and counted and labels is not None and labels.ndim > 1:
        counts = _counted(made, training)
        warnings += [] if counts else [UNKNOWN]
        made = Objective(model, compute, own, counts or "examples", half)
    return made, warnings


@torch.no_grad()
def _counted(made: Objective, training: Table | Buckets) -> str:
    """What the model's own loss of labels [rows, …] is a mean over; empty where it is neither.

    Whether the first label of an example counts is tried, since an untrained model has nearly the
    same loss without it. Then the loss of a few examples must be that mean.
    """
    table = training.tables[0] if isinstance(training, Buckets) else training
    batch = table.rows(np.arange(min(PROBE, len(table)))).trimmed()
    labels = np.asarray(batch.columns[batch.label])
    only = np.full_like(labels, IGNORED)
    only[:, 0] = 0
    made.model.eval()

    def run(labels: Array) -> tuple[Any, torch.Tensor]:
        asked = Table({**batch.columns, batch.label: labels}, batch.label)
        out = made.model(**inputs_of(made.model, asked, made.own))
        return field_of(out, "loss"), scores_of(out).float()

    own, scores = run(labels)
    if not isinstance(own, torch.Tensor):
        return "labels"  # ours is used
    targets = from_numpy(labels).to(scores.device).long()
    if scores.shape[:-1] != targets.shape:
        return ""
    first, _ = run(only)
    counts = "labels" if bool(first.isfinite()) and bool(first != 0) else "next"
    if counts == "next":
        scores, targets = scores[:, :-1], targets[:, 1:]
    mean = nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten())
    return counts if torch.allclose(mean, own.float(), rtol=1e-3, atol=0) else ""


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
    said = f"the data has {used} labels, the model scores {scores.shape[1]} classes"
    return [said] if used < scores.shape[1] else []


def inputs_of(model: AdaptedModule, batch: Table, own: str = "") -> dict[str, object]:
    """A batch as the model's arguments, on its device."""
    device = device_of(model)
    keep = {k: v for k, v in batch.columns.items() if k != batch.label or own}
    return {k: from_numpy(v).to(device) for k, v in keep.items()}


# Losses of the training loop: the model's own, cross entropy, squared error, or a function.


IGNORED = -100
"""A label that torch's cross entropy leaves out."""
Loss = Callable[[Any, torch.Tensor | None], torch.Tensor]


def loss_function(name: str | Loss, label: str, accepts: Callable[[str], bool]) -> tuple[Loss, str]:
    """(loss, argument that carries the labels into the model; empty where the loss takes them).

    `ce` is the model's own loss where it takes the label column as an argument and returns one.
    """
    if callable(name):
        return name, ""
    expect_name(name, ("ce", "mse"), "no loss", "ce, mse or module:function")
    own = label if label and accepts(label) else ""

    def loss(out: object, labels: torch.Tensor | None) -> torch.Tensor:
        found = field_of(out, "loss")
        if own and name == "ce" and isinstance(found, torch.Tensor):
            return found
        scores = scores_of(out)
        if labels is None:
            raise LoraFxError("the data has no label column", UNLABELLED)
        if name == "mse" and scores.squeeze(-1).shape != labels.squeeze(-1).shape:
            raise LoraFxError(
                f"the model gives {list(scores.shape)}, the labels are {list(labels.shape)}",
                "mse needs a label for every output",
            )
        if name == "mse":
            return nn.functional.mse_loss(scores.squeeze(-1).float(), labels.squeeze(-1).float())
        check_labels(labels, scores.shape[-1])
        return nn.functional.cross_entropy(scores.flatten(0, -2).float(), labels.flatten().long())

    return loss, own


def scores_of(out: object) -> torch.Tensor:
    """`.logits`, else the first tensor that comes out.

    Raises:
        LoraFxError: That is a single number, as of (loss, logits).
    """
    scores = field_of(out, "logits")
    if not isinstance(scores, torch.Tensor):
        scores = next(t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
    if not scores.dim():
        raise LoraFxError(
            "the model gives a number first, and no scores",
            "let forward return {'loss': …, 'logits': …}",
        )
    return scores


def field_of(out: object, name: str) -> object:
    """An output's field, of a mapping or an object; None where it has none."""
    return out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Refuse labels that are no class of the model; -100 stands for "ignore"."""
    if not has_values(labels):
        return
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
