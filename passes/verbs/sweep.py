"""Many adapters over one base, some of them at a time; the best is for the caller to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lora_fx.data import Buckets, Table
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.dotted_names import named_tensors
from lora_fx.fx.load.models import check_device
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.train.loop import TrainRun, prepared
from lora_fx.fx.train.loss import Loss
from lora_fx.fx.train.optimizer import Optimizer
from lora_fx.fx.train.run_facts import Facts, facts_of
from lora_fx.fx.train.settings import Settings
from lora_fx.fx.train.together import RunProgress, fit_together
from lora_fx.fx.train.train_report import TrainReport
from lora_fx.passes.verbs.adapt import refuse_second_adapter
from lora_fx.passes.verbs.options import InsertOptions
from lora_fx.passes.verbs.quantise import Wanted, quantised
from lora_fx.passes.verbs.shared_base import SharedBase
from lora_fx.text import by_key


def shared_base(
    cap: Captured,
    options: InsertOptions,
    quantise: Wanted | None = None,
    device: str = "cpu",
    *,
    recompute: bool = False,
) -> SharedBase:
    """Return the base of several adapters.

    Args:
        cap: The capture.
        options: Those of any of the adapters, for what is trained whole.
        quantise: As in insert.
        device: Where the runs are.
        recompute: Whether blocks run again in backward.

    Raises:
        LoraFxError: As for insert, and where the model does not fit on the device.
    """
    refuse_second_adapter(cap)
    if quantise:
        first_names, _ = named_tensors(cap.model)
        cap = quantised(cap, quantise, options.whole(first_names))
    return SharedBase(cap, check_device(device), recompute)


LIKE = 1e-6
"""How far two equal validation losses may differ, of their size: one machine gives equal bits."""
HALF_LIKE = 1e-3
"""The same where products or weights have 16 bits."""


@dataclass(frozen=True)
class BeforeTraining:
    """A run before its first step, by which a finished one is told from one of another model.

    Facts have both ends of each weight, and the source of a loss; this has all that they compute.

    Attributes:
        prepare: Return the run.
        confirmed: Validation losses before training that runs of this sweep have.
    """

    prepare: Callable[[], TrainRun]
    confirmed: set[float | None]

    def difference(self, before: float | None) -> str:
        """Return how a finished run differs, in words; empty if it does not.

        Args:
            before: Its validation loss before training.
        """
        if before in self.confirmed:  # as those of all runs whose B is 0
            return ""
        run = self.prepare()
        with run.objective.alone():
            now = run.loss_of_start()
        if before is None or now is None:
            is_same = before is now
        else:
            is_same = math.isclose(before, now, rel_tol=_tolerance(run))
        if not is_same:
            return f"model or loss: before training it is {before} in the state, {now} now"
        self.confirmed.add(before)
        return ""


def _tolerance(run: TrainRun) -> float:
    """Return how far two validation losses of a run may differ, of their size."""
    is_half = any(tensor.dtype.itemsize == 2 for tensor in run.model.parameters())
    return HALF_LIKE if is_half or run.objective.half else LIKE


Known = Callable[[int, Facts, BeforeTraining], TrainReport | None]
"""A function of the number of a run and what it shares; None if the run is not finished."""


@dataclass(frozen=True)
class SweepRun:
    """One adapter of a sweep: what is inserted, and how it is trained."""

    options: InsertOptions
    settings: Settings


@dataclass(frozen=True)
class SweepResult:
    """A finished run of a sweep.

    Attributes:
        number: Its place among the runs, from 0.
        report: Its losses.
        module: The module, with its best adapter; a known run's has not been trained.
        facts: What a run shares with this one that has the same result; without `known`, empty.
        is_known: Whether the report was known before.
    """

    number: int
    report: TrainReport
    module: AdaptedModule
    facts: Facts
    is_known: bool = False


def sweep(
    base: SharedBase,
    runs: Sequence[SweepRun],
    training: Table | Buckets,
    validation: Table | None,
    loss: str | Loss = "ce",
    *,
    together: int = 1,
    progress: RunProgress | None = None,
    known: Known | None = None,
) -> Iterator[SweepResult]:
    """Train adapters over one base, some at a time; yield each one as it is finished.

    Losses and adapters are those that each run has alone, with the same data and settings.

    Args:
        base: The captured model.
        runs: What differs between the runs.
        training: As in fit.
        validation: As in fit.
        loss: As in fit.
        together: How many runs take their steps at a time.
        progress: Called as (run, step, steps, loss).
        known: Called as (run, facts, start); a run whose report it returns is not trained.

    Raises:
        LoraFxError: As for insert and fit: what does not fit the model, before any run is trained.
            A run whose loss is not finite ends alone.
    """
    for run in {_kind(run.options): run for run in runs}.values():
        base.check(run.options)
    is_first = True
    confirmed: set[float | None] = set()
    for group in _groups(runs, together):
        results = []
        for number in group:
            run = runs[number]
            module = base.module(run.options)
            facts: Facts = {}
            report = None
            if known is not None:
                facts = _facts(module, run, training, validation, loss)
                prepare = partial(prepared, module, training, validation, loss, run.settings)
                report = known(number, facts, BeforeTraining(prepare, confirmed))
            if report is None:
                results.append(SweepResult(number, TrainReport(), module, facts))
            else:
                yield SweepResult(number, report, module, facts, is_known=True)
        if not results:
            continue

        numbers = [result.number for result in results]
        reports = fit_together(
            [result.module for result in results],
            training,
            validation,
            loss,
            [runs[number].settings for number in numbers],
            None if progress is None else _told(progress, numbers),
            check_memory=is_first,
        )
        is_first = False
        results.reverse()  # each module goes when its result is used
        for report in reports:
            yield replace(results.pop(), report=report)


def _facts(
    module: AdaptedModule,
    run: SweepRun,
    training: Table | Buckets,
    validation: Table | None,
    loss: str | Loss,
) -> Facts:
    """Return what another run has to share that has the same result."""
    optimizer = Optimizer(module, run.settings, run.settings.steps_on(training))
    facts = facts_of(module, training, validation, loss, optimizer, 1)
    return {**facts, "start": {"init": run.options.init}}


def _groups(runs: Sequence[SweepRun], together: int) -> Iterator[list[int]]:
    """Yield the numbers of runs that train at a time: those of one kind, since these share steps.

    A kind is what is inserted, but for the seed.
    """
    kinds = by_key((_kind(run.options), number) for number, run in enumerate(runs))
    for numbers in kinds.values():
        for first in range(0, len(numbers), together):
            yield numbers[first : first + together]


def _kind(options: InsertOptions) -> tuple[object, ...]:
    """Return the options by which runs differ that cannot share steps."""
    start = (id(options.plan), id(options.adapter), options.init)
    return options.rank, options.alpha, options.variant, options.dropout, *start


def _told(progress: RunProgress, numbers: Sequence[int]) -> RunProgress:
    """Return a progress whose runs are numbered among those of a group."""
    return lambda place, *step: progress(numbers[place], *step)
