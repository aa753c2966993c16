"""A plain training loop: an optimizer and its schedule, validation, the best adapter kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lora_fx.data import Buckets, Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.train import state
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.train.objective import UNKNOWN, Objective, objective
from lora_fx.fx.train.processes import ALONE, Processes
from lora_fx.fx.train.state import Facts, Optimizer, Saving, Settings, Trail, TrainReport

__all__ = ["Saving", "Settings", "fit"]

NO_VALIDATION = (
    "no validation data: overfitting would not be seen, and the last adapter is kept, not the best"
)
Progress = Callable[[int, int, float], None]
"""What is told the step, the steps in all, and the loss."""
APART = 1_000_003
"""How far the seeds of two processes lie apart, whose dropout must differ."""


def fit(
    model: AdaptedModule,
    training: Table | Buckets,
    validation: Table | None = None,
    loss: str | Loss = "ce",
    settings: Settings | None = None,
    progress: Progress | None = None,
    *,
    saving: Saving | None = None,
    world: Processes = ALONE,
) -> TrainReport:
    """Train a model's adapter; afterwards it holds the best one by validation loss.

    Args:
        model: From insert; only what requires grad moves.
        training: Columns by argument name, and the label.
        validation: Held-out examples; without them the last adapter is kept, and that is said.
        loss: ce, mse, or a function of (output, labels), a mean over the examples.
        settings: Steps, learning rate and so on.
        progress: Called as (step, steps, loss).
        saving: A state to go on from, and where to keep one.
        world: The processes that share the run, from `train_processes.processes`. Each calls fit
            with the same model and data.

    Raises:
        LoraFxError: A column that the model does not take, patience without validation, a state
            of another run, or a loss or gradient that is not finite: the message names the step
            and the first target whose gradient is not, and no weight has moved in that step.
    """
    s = settings or Settings()
    saving = saving or Saving()
    steps = s.steps or math.ceil(s.epochs * training.count(s.batch_size))
    optimizer = Optimizer(model, s, steps)
    rows = part_rows(model, s.batch_size, s.accumulate * world.size)
    made, warnings = objective(model, training, loss, s.mixed_precision == "bf16", rows)
    if world.size * s.accumulate == 1:
        warnings = [w for w in warnings if w != UNKNOWN]
    held_out = validation if validation is not None and len(validation) else None
    if held_out is None:
        warnings.append(NO_VALIDATION)
        if s.patience is not None:
            raise LoraFxError(
                f"patience {s.patience}, but no example is held out", "--validation 0.1 is usual"
            )
    alone = world.size * s.accumulate == 1 and not saving.folder and not saving.resume
    if execution_of(model).norm_stats == "update" and not alone:
        raise LoraFxError(
            "norm_stats='update': running statistics would depend on how a batch is cut up, and no "
            "state keeps them",
            "norm_stats='frozen', or one process, one part and no state",
        )
    facts: Facts = {}
    if saving.folder or saving.resume or world.size > 1:
        facts = state.facts_of(model, training, held_out, loss, optimizer, world.size)
    if world.size > 1:
        world.same(state.digests(model, facts))
    trail = Trail()
    run = _Run(made, optimizer, world, saving, facts, held_out, rows)
    if saving.resume:
        trail = state.load(saving.resume, optimizer, facts, world)
        trail.report.resumed = trail.step
    else:
        if held_out is not None:
            trail.report.before = made.mean(held_out, rows, world)
        torch.manual_seed(s.seed + APART * world.rank)
    run.go(training, trail, progress)
    report = trail.report
    if report.best_step and report.best_step != trail.step:
        state.put_back(optimizer, trail.kept)
    report.best_step = report.best_step or steps
    report.warnings += warnings
    if report.before is not None and not trail.best < report.before:
        report.warnings.append(
            f"the lowest validation loss is {trail.best:.4f}, before training it was "
            f"{report.before:.4f}: the adapter makes the model no better"
        )
    model.eval()
    return report


def part_rows(model: AdaptedModule, batch_size: int, parts: int) -> int:
    """How many rows run at a time in a step, which is what a user's memory is enough for.

    Args:
        model: The model.
        batch_size: The examples of a step.
        parts: How many parts they run in, those of all processes together.
    """
    return max(_least(model), math.ceil(batch_size / parts))


def _least(model: AdaptedModule) -> int:
    """The fewest rows that the model's graph takes."""
    return 2 if any(d == 0 for _, d in execution_of(model).not_one) else 1


@dataclass(frozen=True)
class _Run:
    """The loop; what moves is in a Trail and in the model."""

    objective: Objective
    optimizer: Optimizer
    world: Processes
    saving: Saving
    facts: Facts
    held_out: Table | None
    rows: int  # of held-out examples that run at a time

    def go(self, training: Table | Buckets, trail: Trail, progress: Progress | None) -> None:
        """Take the steps that are left."""
        s, steps, report = self.optimizer.settings, self.optimizer.steps, trail.report
        while trail.step < steps and report.stopped is None:
            batches = training.batches(s.batch_size, s.seed + trail.epoch)
            for batch in itertools.islice(batches, trail.at, None):
                report.losses.append(self._take(batch, trail.step + 1))
                trail.step, trail.at = trail.step + 1, trail.at + 1
                if progress is not None:
                    progress(trail.step, steps, report.losses[-1])
                ends = trail.step == steps
                due = trail.step * s.checks % steps < s.checks
                if self.held_out is not None and (due or ends):
                    self._validate(self.held_out, trail)
                ends = ends or report.stopped is not None
                saves = trail.step % self.saving.every == 0 if self.saving.every else due
                if self.saving.folder and (saves or ends):
                    state.save(self.saving, trail, self.optimizer, self.facts, self.world)
                if ends:
                    return
            trail.epoch, trail.at = trail.epoch + 1, 0

    def _validate(self, held_out: Table, trail: Trail) -> None:
        s, report, step = self.optimizer.settings, trail.report, trail.step
        value = self.objective.mean(held_out, self.rows, self.world)
        report.validation[step] = value
        if not math.isfinite(value):
            raise not_finite(step, "validation loss", value, "look at the held-out examples")
        trail.waited += 1
        if value < trail.best:
            trail.best, trail.kept, trail.waited = value, state.snapshot(self.optimizer), 0
            report.best_step = step
        if trail.waited == s.patience and step < self.optimizer.steps:
            report.stopped = step

    def _take(self, batch: Table, step: int) -> float:
        """Take a step, counted from 1; returns the batch's loss before it.

        It is the same for any number of processes and parts, up to rounding. A part's loss is a
        mean over `objective.weight(part)` items, so its share of the batch's loss, and of its
        gradient, is that weight over the weight of the whole batch.

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
        if self.optimizer.settings.clip:
            nn.utils.clip_grads_with_norm_(trained, self.optimizer.settings.clip, norm)
        self.optimizer.take(step)
        return value

    def _parts(self, batch: Table) -> Iterator[tuple[Table, float]]:
        """This process's parts of a batch and their shares of its loss; empty ones left out."""
        parts = self.optimizer.settings.accumulate
        count = self.world.size * parts
        whole = self.objective.weight(batch)
        if count == 1 or not whole:
            yield batch, 1.0 / self.world.size
            return
        least = _least(self.objective.model)
        first = self.world.rank * parts
        rows = np.array_split(np.arange(len(batch)), min(count, max(1, len(batch) // least)))
        for index in rows[first : first + parts]:
            part = batch.rows(index)  # not trimmed: as in the whole batch
            weight = self.objective.weight(part)
            if weight:
                yield part, weight / whole


# A step whose loss or gradient is not finite: the error names it, before any weight moves.


def check_step(model: AdaptedModule, loss: float, norm: float, step: int) -> None:
    """Stop before the optimizer moves anything.

    Args:
        model: The model after backward.
        loss: The loss of this step.
        norm: The norm of all gradients together.
        step: Counted from 1.

    Raises:
        LoraFxError: With exit code 1; names the first tensor, in the order of the targets, whose
            gradient is not finite.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    grads = list(_gradients(model))
    bad = [what for what, grad in grads if not bool(grad.isfinite().all())]
    if bad:
        where = f"first not finite: the gradient of {bad[0]} ({len(bad)} of {len(grads)} are not)"
    else:
        where = "every gradient is finite, their norm or the loss is not"
    what, value = ("loss", loss) if not math.isfinite(loss) else ("norm of the gradients", norm)
    raise not_finite(step, what, value, where)


def _gradients(model: AdaptedModule) -> Iterator[tuple[str, torch.Tensor]]:
    """(what it is called, gradient): A and B of every target, then tensors trained whole."""
    seen: set[int] = set()
    for key, pair in insertion_of(model).slots().items():
        for side, p in zip("AB", pair, strict=True):
            seen.add(id(p))
            if p.grad is not None:
                yield f"{side} of {key!r}", p.grad
    for name, p in model.named_parameters():
        if p.grad is not None and id(p) not in seen:
            yield repr(name), p.grad


def not_finite(step: int, what: str, value: float, where: str) -> LoraFxError:
    """The error of a run that was stopped."""
    return LoraFxError(
        f"step {step}: the {what} is {value}; {where}",
        "a lower --lr, or look at the data",
        exit_code=1,
    )
