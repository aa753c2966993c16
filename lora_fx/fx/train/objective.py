"""The loss of a batch that runs in parts: each part's weight, so that their sum is exact."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lora_fx.data import Buckets, Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.tensors import device_of, from_numpy
from lora_fx.fx.train.loss import IGNORED, Loss, check_labels, loss_function, scores_of
from lora_fx.fx.train.processes import ALONE, Processes
from lora_fx.fx.train.reduction import ROWS, inputs_of, question_rows, reduction

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
    "the model's own loss is not a cross entropy over its labels: each part of a batch is "
    "weighted by its number of examples"
)


LENGTHS = range(2, 65)
"""The numbers of tokens at which a model's conditions are tried; a bound from above holds there."""


@dataclass(frozen=True)
class Objective:
    """The loss that a run minimises.

    Args:
        model: The model.
        compute: The loss of (output, labels), a mean.
        own: The argument that carries the labels into the model; empty where the loss takes them.
        counts: Items of the mean: examples, labels, or next (labels but an example's first).
        half: Whether products run in bfloat16.
        own_loss: Whether the loss is the model's own where it gives one.
    """

    model: AdaptedModule
    compute: Loss
    own: str = ""
    counts: str = "examples"
    half: bool = False
    own_loss: bool = False

    def weight(self, batch: Table) -> int:
        """Return the number of items over which the loss of a batch is a mean."""
        labels = batch.columns.get(batch.label)
        if self.counts == "examples" or labels is None:
            return len(batch)
        if self.counts == "next":
            labels = labels[:, 1:]
        return int((labels != IGNORED).sum())

    @cached_property
    def ignores_padding(self) -> bool:
        """Whether tokens behind a row's last one have no effect, and the model takes every length.

        They have none where each token predicts the next one: none sees those behind it. A model
        whose code asks for multiples of a length, say, fails at some of the lengths tried here.
        """
        if self.counts != "next":
            return False
        captured = execution_of(self.model).captured
        door = captured.traced(False, captured.named).door
        if any(axis != 0 for _, axis in door.fixed(captured.requested)):
            return False
        return all(
            condition.holds({size: length if size[1] else ROWS for size in condition.about})
            for condition in door.conditions
            for length in LENGTHS
        )

    def loss(self, batch: Table) -> torch.Tensor:
        """Return the mean loss of a batch, with its autograd graph, in the model's current mode."""
        with self.precision(device_of(self.model)):
            out = self.model(**inputs_of(self.model, batch, self.own))
            return self.loss_of(out, batch)

    def loss_of(self, out: object, batch: Table) -> torch.Tensor:
        """Return the mean loss of a batch from the model's output."""
        labels = batch.columns.get(batch.label)
        if labels is None:
            return self.compute(out, None)
        return self.compute(out, from_numpy(labels).to(device_of(self.model)))

    def precision(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Return a block in which products run in the run's precision; the meta device has one."""
        if device.type == "meta":
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16, enabled=self.half)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Return a block in which the model may leave its scores out, if its own loss is used."""
        if self.own and self.own_loss:
            return execution_of(self.model).loss_alone()
        return contextlib.nullcontext()

    @torch.no_grad()
    def mean(self, table: Table, batch_size: int, world: Processes = ALONE) -> float:
        """Return the mean loss over a table, in eval mode; the processes share the batches."""
        self.model.eval()
        if self.ignores_padding:
            table = table.by_length()
        total = 0.0
        weight = 0.0
        for i, batch in enumerate(table.batches(batch_size)):
            if i % world.size != world.rank:
                continue
            count = self.weight(batch)
            if count:
                total += float(self.loss(batch)) * count
                weight += count
        total, weight = world.total(total, weight)
        return total / weight if weight else math.nan


def objective(
    model: AdaptedModule, training: Table | Buckets, loss: str | Loss, half: bool, rows: int = ROWS
) -> tuple[Objective, list[str]]:
    """Return the loss that a run minimises, and warnings.

    Args:
        model: The model.
        training: The data that it is asked about.
        loss: As in fit.
        half: Whether products run in bfloat16.
        rows: How many rows run at a time; see lora_fx.fx.train.reduction.question_rows.

    Raises:
        LoraFxError: A column that the model does not take, or a label that is no class of it.
    """
    arguments = execution_of(model).captured.signature.keywords
    _refuse_unknown_columns(model, training)
    compute, own = loss_function(loss, training.label, lambda name: name in arguments)
    labels = training.columns.get(training.label)
    warnings = _heed_classes(model, training, own, rows) if loss == "ce" else []

    counts = "examples"
    if loss == "ce" and labels is not None and labels.dtype.kind in "iu":
        counts = "labels"
        if own and labels.ndim > 1:
            table = training.tables[0] if isinstance(training, Buckets) else training
            counts = reduction(model, table, own, rows)
    if not counts:
        warnings.append(UNKNOWN)
        counts = "examples"
    return Objective(model, compute, own, counts, half, loss == "ce"), warnings


def _refuse_unknown_columns(model: AdaptedModule, training: Table | Buckets) -> None:
    signature = execution_of(model).captured.signature
    arguments = signature.keywords
    for name in training.columns:
        if name != training.label and name not in arguments and not signature.open:
            raise LoraFxError(
                f"the model has no argument {name!r}",
                f"its arguments are {', '.join(sorted(arguments))}",
            )


def _heed_classes(
    model: AdaptedModule, training: Table | Buckets, own: str, rows: int
) -> list[str]:
    """Check one label per example against the model's scores before any step; return warnings."""
    tables = training.tables if isinstance(training, Buckets) else [training]
    needed = training.label in execution_of(model).captured.signature.required
    if needed or tables[0].columns.get(training.label, np.zeros(())).ndim != 1:
        return []
    labels = torch.cat([from_numpy(np.asarray(t.columns[training.label])) for t in tables])
    question = question_rows(model, tables[0], rows)
    inputs = inputs_of(model, question)
    if own and not labels.is_floating_point():
        # without labels it is another program, which would be captured for this question alone
        inputs[own] = labels.new_zeros(len(question), device=device_of(model))
    model.eval()
    with torch.no_grad():
        out = model(**inputs)
    scores = scores_of(out)
    if scores.dim() != 2 or scores.shape[1] < 2:
        return []
    check_labels(labels, scores.shape[1])
    used = len(np.unique(labels[labels != IGNORED].numpy()))
    if used >= scores.shape[1]:
        return []
    return [f"the data has {used} labels, the model scores {scores.shape[1]} classes"]
