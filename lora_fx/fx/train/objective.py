"""The loss of a batch, in parts: what each part weighs, so that their sum is that of the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from lora_fx.data import Buckets, Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.tensors import device_of, from_numpy
from lora_fx.fx.train.loss import IGNORED, Loss, check_labels, loss_function, scores_of
from lora_fx.fx.train.processes import ALONE, Processes
from lora_fx.fx.train.reduction import ROWS, few, inputs_of, reduction

__all__ = [
    "IGNORED",
    "UNKNOWN",
    "Loss",
    "Objective",
    "inputs_of",
    "loss_function",
    "objective",
    "scores_of",
]

UNKNOWN = (
    "the model's own loss is no cross entropy over its labels: the parts of a batch count by their "
    "examples"
)


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
    model: AdaptedModule, training: Table | Buckets, loss: str | Loss, half: bool, rows: int = ROWS
) -> tuple[Objective, list[str]]:
    """What a run makes small, and warnings.

    Args:
        model: The model.
        training: The data that it is asked about.
        loss: As in fit.
        half: Whether products run in bfloat16.
        rows: How many rows run at a time; see lora_fx.fx.train.reduction.few.

    Raises:
        LoraFxError: A column that the model does not take, or a label that is no class of it.
    """
    signature = execution_of(model).captured.signature
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
    warnings = _heed_classes(model, training, rows) if loss == "ce" else []
    if own and counted and labels is not None and labels.ndim > 1:
        first = training.tables[0] if isinstance(training, Buckets) else training
        counts = reduction(model, first, own, rows)
        warnings += [] if counts else [UNKNOWN]
        made = Objective(model, compute, own, counts or "examples", half)
    return made, warnings


def _heed_classes(model: AdaptedModule, training: Table | Buckets, rows: int) -> list[str]:
    """Check one label an example against the model's scores, before any step; returns warnings."""
    tables = training.tables if isinstance(training, Buckets) else [training]
    needed = training.label in execution_of(model).captured.signature.required
    if needed or tables[0].columns.get(training.label, np.zeros(())).ndim != 1:
        return []
    labels = torch.cat([from_numpy(np.asarray(t.columns[training.label])) for t in tables])
    model.eval()
    with torch.no_grad():
        out = model(**inputs_of(model, few(model, tables[0], rows)))
    scores = scores_of(out)
    if scores.dim() != 2 or scores.shape[1] < 2:
        return []
    check_labels(labels, scores.shape[1])
    used = len(np.unique(labels[labels != IGNORED].numpy()))
    said = f"the data has {used} labels, the model scores {scores.shape[1]} classes"
    return [said] if used < scores.shape[1] else []
