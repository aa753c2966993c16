"""One step of a run: the loss and gradients of a batch, however many parts it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from lora_fx.data import Table
from lora_fx.fx.train_finite import check_step
from lora_fx.fx.train_objective import Objective
from lora_fx.fx.train_optimizer import Optimizer
from lora_fx.fx.train_processes import Processes


@dataclass(frozen=True)
class Stepper:
    """Takes steps; the same ones for any number of processes and parts, up to rounding.

    A part's loss is a mean over `objective.weight(part)` items, so its share of the batch's loss,
    and of its gradient, is that weight over the weight of the whole batch.

    Args:
        objective: The loss.
        optimizer: What moves the weights.
        world: The processes that share a batch.
        parts: In which one process's share runs, one after another.
        clip: The longest gradient; 0 for any.
    """

    objective: Objective
    optimizer: Optimizer
    world: Processes
    parts: int
    clip: float

    def __call__(self, batch: Table, step: int) -> float:
        """Take a step, counted from 1; returns the batch's loss before it.

        Raises:
            LoraFxError: The loss or a gradient is not finite; no weight has moved.
        """
        model, trained = self.objective.model, self.optimizer.trained
        model.train()
        self.optimizer.clear()
        value = 0.0
        for part, share in self._parts(batch):
            loss = self.objective.loss(part) * share
            loss.backward()  # type: ignore[no-untyped-call]
            value += float(loss.detach())
        value, _ = self.world.total(value)
        self.world.add([p.grad for p in trained], trained)
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        check_step(model, value, float(norm), step)  # clipping would spread a nan
        if self.clip:
            nn.utils.clip_grads_with_norm_(trained, self.clip, norm)
        self.optimizer.take(step)
        return value

    def _parts(self, batch: Table) -> Iterator[tuple[Table, float]]:
        """This process's parts of a batch and their shares of its loss; empty ones left out."""
        count = self.world.size * self.parts
        whole = self.objective.weight(batch)
        if count == 1 or not whole:
            yield batch, 1.0 / self.world.size
            return
        least = 2 if any(d == 0 for _, d in self.objective.model.not_one) else 1
        first = self.world.rank * self.parts
        rows = np.array_split(np.arange(len(batch)), min(count, max(1, len(batch) // least)))
        for index in rows[first : first + self.parts]:
            part = batch.rows(index)  # not trimmed: as in the whole batch
            weight = self.objective.weight(part)
            if weight:
                yield part, weight / whole
