"""The training loop: an optimizer and its schedule, validation, and the best adapter kept."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from lora_fx.data import Buckets, Table
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import replacing
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.tensors import device_of
from lora_fx.fx.train import run_facts, state
from lora_fx.fx.train.finite_steps import IN_DATA, check_step, not_finite
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.train.objective import UNKNOWN, Objective, objective
from lora_fx.fx.train.optimizer import Optimizer
from lora_fx.fx.train.processes import ALONE, Processes
from lora_fx.fx.train.run_facts import Facts
from lora_fx.fx.train.run_memory import RunMemory, without_own_loss
from lora_fx.fx.train.settings import Saving, Settings
from lora_fx.fx.train.state import Trail
from lora_fx.fx.train.train_report import TrainReport
from lora_fx.progress import stage

__all__ = ["Saving", "Settings", "TrainRun", "fit", "prepared"]

NO_VALIDATION = (
    "no validation data: overfitting would not be seen, and the last adapter is kept, not the best"
)
Progress = Callable[[int, int, float], None]
"""A function that is called with the step, the number of steps, and the loss."""
APART = 1_000_003
"""The difference between the seeds of two processes, so that their dropouts differ."""


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
    """Train a model's adapter; afterwards the model holds the best one by validation loss.

    Args:
        model: From insert; only what requires grad moves.
        training: Columns by argument name, and the label.
        validation: Held-out examples; without them the last adapter is kept, and that is said.
        loss: ce, mse, or a function of (output, labels), a mean over the examples.
        settings: Steps, learning rate and so on.
        progress: Called as (step, steps, loss).
        saving: A state to go on from, and where to keep one.
        world: The processes that share the run, from `lora_fx.fx.train.processes`. Each one
            calls fit with the same model and data.

    Raises:
        LoraFxError: A column that the model does not take, patience without validation, a state
            of another run, or a loss or gradient that is not finite: the message names the step
            and the first target whose gradient is not, and no weight has moved in that step.
    """
    run = prepared(model, training, validation, loss, settings, saving=saving, world=world)
    with run.objective.alone():
        run.check_memory(loss)
        trail = run.start()
        for batch in run.batches(trail):
            run.step(batch, trail, progress)
    return run.finish(trail)


def prepared(
    model: AdaptedModule,
    training: Table | Buckets,
    validation: Table | None,
    loss: str | Loss,
    settings: Settings | None,
    *,
    saving: Saving | None = None,
    world: Processes = ALONE,
) -> TrainRun:
    """Return a run before its first step, with its optimizer and its objective.

    Args and errors are those of `fit`.
    """
    settings = settings or Settings()
    saving = saving or Saving()
    optimizer = Optimizer(model, settings, settings.steps_on(training))
    parts = world.size * settings.accumulate
    rows = part_rows(model, settings.batch_size, parts)
    half = settings.mixed_precision == "bf16"
    with stage("finding what the loss is a mean of"):
        run_objective, warnings = objective(model, training, loss, half, rows)
    if parts == 1:
        warnings = [warning for warning in warnings if warning != UNKNOWN]

    held_out = validation if validation is not None and len(validation) else None
    if held_out is None:
        warnings.append(NO_VALIDATION)
        _refuse_patience(settings)
    _refuse_moving_statistics(model, saving, parts)
    facts: Facts = {}
    if saving.folder or saving.resume or world.size > 1:
        facts = run_facts.facts_of(model, training, held_out, loss, optimizer, world.size)
    if world.size > 1:
        world.same(run_facts.digests(model, facts))
    return TrainRun(
        run_objective, optimizer, world, saving, facts, training, held_out, rows, tuple(warnings)
    )


def _refuse_patience(settings: Settings) -> None:
    """Raise for a patience, which waits for validations, if there are no held-out examples."""
    if settings.patience is not None:
        raise LoraFxError(
            f"patience {settings.patience} needs held-out examples, but there are none",
            "pass --validation 0.1, for example",
        )


def _refuse_moving_statistics(model: AdaptedModule, saving: Saving, parts: int) -> None:
    """Raise if running statistics update while a batch is split or a state is saved."""
    if execution_of(model).norm_stats != "update":
        return
    if parts != 1 or saving.folder or saving.resume:
        raise LoraFxError(
            "norm_stats='update': running statistics would depend on how a batch is cut up, and no "
            "state keeps them",
            "use norm_stats='frozen', or one process, one part and no state",
        )


def part_rows(model: AdaptedModule, batch_size: int, parts: int) -> int:
    """Return the number of rows that run at the same time in a step, for memory.

    Args:
        model: The model.
        batch_size: The examples of a step.
        parts: How many parts they run in, those of all processes together.
    """
    return max(_least_rows(model), math.ceil(batch_size / parts))


def _least_rows(model: AdaptedModule) -> int:
    """Return the fewest rows that the model's graph accepts."""
    is_fixed = any(axis == 0 for _, axis in execution_of(model).not_one)
    return 2 if is_fixed else 1


@dataclass(frozen=True)
class TrainRun:
    """A run of the training loop; the changing state is in a Trail and in the model.

    Attributes:
        objective: Its loss, and the model.
        optimizer: Its optimizer, with the settings.
        world: The processes that share it.
        saving: The folder of its states.
        facts: What a resumed state must share; empty where nothing is saved or shared.
        training: The examples.
        held_out: The held-out examples, or None.
        rows: The number of held-out examples that run at a time.
        warnings: What has to be said of it.
    """

    objective: Objective
    optimizer: Optimizer
    world: Processes
    saving: Saving
    facts: Facts
    training: Table | Buckets
    held_out: Table | None
    rows: int
    warnings: tuple[str, ...] = ()

    @property
    def model(self) -> AdaptedModule:
        """The model whose adapter is trained."""
        return self.objective.model

    def check_memory(self, loss: str | Loss, copies: int = 1, *, batched: bool = False) -> None:
        """Tell the memory of the run, and refuse a run that cannot fit.

        Args:
            loss: That of fit.
            copies: How many runs of its kind take their steps together.
            batched: Whether these steps run in one vmap.
        """
        measured = self.objective if isinstance(loss, str) else without_own_loss(self.objective)
        parts = self.world.size * self.optimizer.settings.accumulate
        memory = RunMemory(measured, self.optimizer, self.training, self.rows, parts)
        replace(memory, copies=copies, batched=batched).check()

    def start(self) -> Trail:
        """Return the progress at the start: of the resumed state, or of a new run."""
        if self.saving.resume:
            trail = state.load(self.saving.resume, self.optimizer, self.facts, self.world)
            trail.report.resumed = trail.step
            return trail
        torch.manual_seed(self.optimizer.settings.seed + APART * self.world.rank)
        return Trail()

    def batches(self, trail: Trail) -> Iterator[Table]:
        """Yield the batch of each remaining step; `take` is called before the next one."""
        settings = self.optimizer.settings
        while not self._ends(trail):
            batches = self.training.batches(settings.batch_size, settings.seed + trail.epoch)
            for batch in itertools.islice(batches, trail.at, None):
                yield batch
                if self._ends(trail):
                    return
            trail.epoch += 1
            trail.at = 0

    def _ends(self, trail: Trail) -> bool:
        """Whether no step remains."""
        return trail.step >= self.optimizer.steps or trail.report.stopped is not None

    def first_step(self, trail: Trail) -> contextlib.AbstractContextManager[None]:
        """Return the stage of this run's first step, which compiles what the others run."""
        if trail.report.losses:
            return contextlib.nullcontext()
        return stage("running the first step")

    def step(self, batch: Table, trail: Trail, progress: Progress | None) -> None:
        """Take a step on a batch; validate and save where it is due.

        Args:
            batch: From `batches`.
            trail: The progress, which goes on by a step.
            progress: As in fit.
        """
        with self.first_step(trail):
            value = self.loss_and_gradients(batch, trail.step + 1)
        self.take(value, trail, progress)

    def take(self, loss: float, trail: Trail, progress: Progress | None) -> None:
        """Take a step with the present gradients; validate and save where it is due.

        Args:
            loss: The loss of the batch.
            trail: The progress, which goes on by a step.
            progress: As in fit.
        """
        step = trail.step + 1
        trail.report.losses.append(loss)
        if progress is not None:
            progress(step, self.optimizer.steps, loss)
        if step == 1:
            self._validate_before_training(trail)
        self.optimizer.take(step)
        trail.step = step
        trail.at += 1
        self._validate_and_save(trail)

    def finish(self, trail: Trail) -> TrainReport:
        """Give the model the best adapter, and return the report of the whole run."""
        report = trail.report
        if report.resumed == trail.step:  # the resumed run had ended, so that no step was left
            self._write_curve(report)
        if report.best_step and report.best_step != trail.step:
            state.set_trained(self.optimizer, trail.kept)
        report.best_step = report.best_step or self.optimizer.steps
        report.warnings += self.warnings
        if report.before is not None and not trail.best < report.before:
            report.warnings.append(
                f"the lowest validation loss is {trail.best:.4f}, but before training it was "
                f"{report.before:.4f}: the adapter does not improve the model"
            )
        self.model.eval()
        return report

    def _validate_before_training(self, trail: Trail) -> None:
        """Compute the validation loss of the untrained model.

        That is after the first loss, which shows a user what a step takes, and before any weight
        moves. The random numbers of the steps are the same without it.
        """
        trail.report.before = self.loss_of_start()

    def loss_of_start(self) -> float | None:
        """Return the validation loss of the model as it is; None without validation."""
        if self.held_out is None:
            return None
        device = device_of(self.objective.model)
        devices = [device] if device.type == "cuda" else []
        with stage("validating before any weight changes"), torch.random.fork_rng(devices):
            return self.objective.mean(self.held_out, self.rows, self.world)

    def _validate_and_save(self, trail: Trail) -> None:
        """Validate and save if this step requires it."""
        steps = self.optimizer.steps
        checks = self.optimizer.settings.checks
        is_last = trail.step == steps
        is_due = trail.step * checks % steps < checks
        if self.held_out is not None and (is_due or is_last):
            self._validate(self.held_out, trail)
        ends = self._ends(trail)
        saves = is_due
        if self.saving.every:
            saves = trail.step % self.saving.every == 0
        if self.saving.folder and (saves or ends):
            with stage("saving a state"):
                state.save(self.saving, trail, self.optimizer, self.facts, self.world)
        if is_due or ends:
            self._write_curve(trail.report)
        if self.saving.watch and is_due and not ends and self.world.first:
            self.saving.watch(trail.report, steps, self.facts)

    def _write_curve(self, report: TrainReport) -> None:
        """Write the losses so far to the file that a user asked for."""
        if self.saving.curve and self.world.first:
            # the run's own file, which it may replace: what a user had there was refused before
            with replacing(self.saving.curve, force=True) as temporary:
                temporary.write_text(report.to_csv(), encoding="utf-8")

    def _validate(self, held_out: Table, trail: Trail) -> None:
        """Compute the validation loss, keep the adapter if it is the lowest, check patience."""
        report = trail.report
        with stage("validating"):
            value = self.objective.mean(held_out, self.rows, self.world)
        report.validation[trail.step] = value
        if not math.isfinite(value):
            raise self._not_finite_validation(value, held_out, trail)
        trail.waited += 1
        if value < trail.best:
            trail.best = value
            trail.kept = state.snapshot(self.optimizer)
            trail.waited = 0
            report.best_step = trail.step
        is_out_of_patience = trail.waited == self.optimizer.settings.patience
        if is_out_of_patience and trail.step < self.optimizer.steps:
            report.stopped = trail.step

    @staticmethod
    def _not_finite_validation(value: float, held_out: Table, trail: Trail) -> LoraFxError:
        """Return the error of a validation loss that is not finite."""
        if math.isnan(value) and held_out.place_of_nan:
            return not_finite(trail.step, "validation loss", value, held_out.place_of_nan, IN_DATA)
        return not_finite(trail.step, "validation loss", value, "check the held-out examples")

    def loss_and_gradients(self, batch: Table, step: int) -> float:
        """Compute the gradients of a step, counted from 1; return the batch's loss.

        The step is the same for any number of processes and parts, up to rounding. A part's loss
        is a mean over `objective.weight(part)` items, so its share of the batch's loss, and of its
        gradient, is that weight over the weight of the whole batch.

        Raises:
            LoraFxError: The loss or a gradient is not finite; no weight has moved.
        """
        self.model.train()
        self.optimizer.clear()
        value = 0.0
        for part, share in self.parts(batch):
            loss = self.objective.loss(part) * share
            loss.backward()  # type: ignore[no-untyped-call]
            value += float(loss.detach())
        return self.finished_gradients(value, step)

    def finished_gradients(self, value: float, step: int) -> float:
        """Sum the gradients of all processes, check and clip them; return the batch's loss.

        Args:
            value: This process's share of the loss.
            step: Counted from 1.

        Raises:
            LoraFxError: The loss or a gradient is not finite; no weight has moved.
        """
        trained = self.optimizer.trained
        value, _ = self.world.total(value)
        self.world.add([parameter.grad for parameter in trained], trained)

        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        check_step(self.model, value, float(norm), step, self.training.place_of_nan)
        clip = self.optimizer.settings.clip
        if clip:
            nn.utils.clip_grads_with_norm_(trained, clip, norm)
        return value

    def parts(self, batch: Table) -> Iterator[tuple[Table, float]]:
        """Yield this process's parts of a batch with their shares of its loss; skip empty ones."""
        parts = self.optimizer.settings.accumulate
        count = self.world.size * parts
        batch_weight = self.objective.weight(batch)
        if count == 1 or not batch_weight:
            yield batch, 1.0 / self.world.size
            return
        most = max(1, len(batch) // _least_rows(self.objective.model))
        first = self.world.rank * parts
        if self.objective.ignores_padding:
            batch = batch.by_length()
        indices = np.array_split(np.arange(len(batch)), min(count, most))
        for index in indices[first : first + parts]:
            part = batch.rows(index)
            if self.objective.ignores_padding:
                part = part.trimmed()
            weight = self.objective.weight(part)
            if weight:
                yield part, weight / batch_weight
