"""The options of train that make it many runs over one base, and the table of these runs."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_fx.adapter.variant import named_variant
from lora_fx.cli.branch_options import PLANNED, TargetOptions
from lora_fx.cli.data_arguments import BATCH, batches_of
from lora_fx.cli.options import Rules, count_option, given_here, option, repeatable
from lora_fx.cli.output import note, say
from lora_fx.cli.saved_runs import SavedRuns
from lora_fx.cli.step_lines import StepLines
from lora_fx.cli.train_options import TRAINED, ExampleOptions, LoopOptions, with_checks
from lora_fx.errors import LoraFxError, NoSay, expect_name, refuse_no_say
from lora_fx.text import Json, JsonView

if TYPE_CHECKING:
    from lora_fx.data import Table
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.module.adapted import AdaptedModule
    from lora_fx.fx.train.loss import Loss
    from lora_fx.fx.train.run_facts import Facts
    from lora_fx.fx.train.settings import Settings
    from lora_fx.fx.train.train_report import TrainReport
    from lora_fx.passes.verbs.options import InsertOptions
    from lora_fx.passes.verbs.sweep import BeforeTraining, SweepResult, SweepRun
    from lora_fx.run_defaults import RunDefaults

SWEPT = {
    "targets": {
        "rank": "4,8,16",
        "alpha": "8,16",
        "variant": "lora,dora",
        "init": "kaiming,pissa",
        "dropout": "0,0.1",
        "seed": "0,1,2",
    },
    "loop": {
        "lr": "1e-4,3e-4",
        "schedule": "cosine,linear",
        "optimizer": "adamw_torch,sgd",
        "weight_decay": "0,0.01",
        "warmup": "0,0.1",
        "clip": "0,1",
        "steps": "100,200",
        "epochs": "1,3",
        "batch_size": "16,32",
    },
}
"""The options that may differ between runs, by the group that has them: name → sample values."""
EXAMPLES = SWEPT["targets"] | SWEPT["loop"]


@dataclass(frozen=True, kw_only=True)
class SweepOptions(LoopOptions):
    """The options of the training loop, of one run or of a sweep of several."""

    sweep: tuple[str, ...] = repeatable(
        "--sweep",
        "NAME=VALUE,…",
        "Train an adapter with each value of an option, and keep the best: --sweep rank=4,8.",
    )
    seeds: int | None = count_option(
        "--seeds", "Train with N seeds, from --seed on, and keep the best adapter."
    )
    together: int | None = count_option(
        "--together", "Take the steps of N runs of a sweep at a time.  [default: 1]"
    )
    save_runs: str | None = option(
        "--save-runs",
        metavar="DIR",
        help="Keep the adapter of every run in this folder.",
    )

    @property
    def is_sweep(self) -> bool:
        """Whether there are several runs."""
        return bool(self.sweep or self.seeds)


@dataclass(frozen=True)
class Variation:
    """The options of one run of a sweep.

    Attributes:
        values: Those that differ from run to run, by name.
        targets: Those of its branches.
        loop: Those of its loop.
    """

    values: Mapping[str, Any]
    targets: TargetOptions
    loop: SweepOptions

    @property
    def name(self) -> str:
        """The run as a text, also the name of its folder: `rank=4,lr=0.0003`."""
        words = [f"{name.replace('_', '-')}={shown(v)}" for name, v in self.values.items()]
        return ",".join(words).replace(":", "-")


def planned_runs(
    loop: SweepOptions, targets: TargetOptions, examples: ExampleOptions
) -> list[Variation]:
    """Return the runs of a sweep, none without one; raise for what the options alone show wrong.

    That is before torch is imported. `check_runs` does the rest.

    Args:
        loop: The options of the loop and of the sweep.
        targets: The options of the branches.
        examples: The options of the examples.
    """
    if not loop.is_sweep:
        return []
    runs = variations(loop, targets, (*PLANNED, *TRAINED))
    for run in runs:
        named_variant(run.targets.variant)
    if examples.validation == 0:
        raise LoraFxError(
            "a sweep keeps the adapter with the best validation loss, and --validation is 0",
            "pass --validation 0.1, for example, or --eval-data FILE",
        )
    names = [run.name for run in runs]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise LoraFxError(f"{count} runs of the sweep are named {name}", "leave out all but one")
    if loop.save_runs:
        SavedRuns(Path(loop.save_runs)).check(names)
    return runs


def check_runs(runs: Sequence[Variation], processes: int) -> None:
    """Raise, before any work, for a run whose settings are wrong, or for several processes.

    Args:
        runs: The runs of a sweep, none without one.
        processes: How many processes share the command.
    """
    if runs and processes > 1:
        raise LoraFxError(
            f"a sweep runs in one process, and {processes} were started",
            "start lora-fx train without torchrun or accelerate launch",
        )
    for run in runs:
        run.loop.settings(run.targets.seed)  # which refuses a name that is not known


def variations(loop: SweepOptions, targets: TargetOptions, rules: Rules) -> list[Variation]:
    """Return the runs of a sweep: every combination of the values, the seeds last.

    Args:
        loop: The options, with those of the sweep.
        targets: The options that the runs start from.
        rules: Those that say when an option has no effect.

    Raises:
        LoraFxError: A name that cannot be swept, no value or one twice, an option that is given
            beside its values, or one that has no effect in a run.
    """
    context = click.get_current_context()
    values = swept_values(loop.sweep, context)
    typed = given_here(context)
    spelled = {name: f"--sweep {name.replace('_', '-')}" for name in values}
    for name in values:
        if name in typed:
            raise LoraFxError(f"{typed[name]} has no effect with {spelled[name]}", "leave it out")
    if loop.seeds:
        if "seed" in values:
            raise LoraFxError("--seeds has no effect with --sweep seed", "leave one of them out")
        values["seed"] = list(range(targets.seed, targets.seed + loop.seeds))

    runs = []
    for combination in itertools.product(*values.values()):
        setting = dict(zip(values, combination, strict=True))
        refuse_no_say(rules, {**context.params, **setting}, {**typed, **spelled})
        of_targets = {name: setting[name] for name in SWEPT["targets"] if name in setting}
        of_loop = {name: setting[name] for name in SWEPT["loop"] if name in setting}
        runs.append(Variation(setting, replace(targets, **of_targets), replace(loop, **of_loop)))
    return runs


def swept_values(texts: Sequence[str], context: click.Context) -> dict[str, list[Any]]:
    """Read `NAME=VALUE,…`; the values are checked as those of the option NAME.

    Raises:
        LoraFxError: Names the option.
    """
    params = {param.name: param for param in context.command.params}
    values: dict[str, list[Any]] = {}
    for text in texts:
        written, equals, listed = text.partition("=")
        name = written.strip().removeprefix("--").replace("-", "_")
        spelled = [example.replace("_", "-") for example in EXAMPLES]
        if not equals:
            raise LoraFxError(f"--sweep {text}: there is no '='", _example(name))
        expect_name(
            name.replace("_", "-"),
            spelled,
            "--sweep cannot vary",
            f"it varies {', '.join(spelled)}",
        )
        if name in values:
            raise LoraFxError(f"--sweep {written} is given twice", "list all values in one of them")
        words = [word.strip() for word in listed.split(",") if word.strip()]
        if not words:
            raise LoraFxError(f"--sweep {text}: there is no value", _example(name))
        try:
            values[name] = [params[name].type_cast_value(context, word) for word in words]
        except click.BadParameter as error:
            raise LoraFxError(
                f"--sweep {text}: {error.message}", _values_of(params[name])
            ) from error
        repeated = [value for value, count in Counter(values[name]).items() if count > 1]
        if repeated:
            raise LoraFxError(
                f"--sweep {text}: {shown(repeated[0])} is there twice", _example(name)
            )
    return values


def _example(name: str) -> str:
    """Return a hint with values of an option, or of --rank if it cannot be swept."""
    name = name if name in EXAMPLES else "rank"
    return f"pass --sweep {name.replace('_', '-')}={EXAMPLES[name]}, for example"


def _values_of(param: click.Parameter) -> str:
    """Return a hint with all values of an option, or with an example if it takes any number."""
    if isinstance(param.type, click.Choice):
        return f"use {', '.join(param.type.choices)}"
    return _example(param.name or "")


def shown(value: object) -> str:
    """Return a value as the table has it; two values that differ are two texts."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


@dataclass
class Finished:
    """The finished runs of a sweep, and the best of them by validation.

    Attributes:
        runs: All runs.
        saved: The folder that keeps them; None for none.
        reports: The reports of those that are finished, by number.
        best: The number of the best; None before any.
        module: Its module.
        folders: The folders of saved adapters, by number.
    """

    runs: Sequence[Variation]
    saved: SavedRuns | None = None
    reports: dict[int, TrainReport] = field(default_factory=dict)
    best: int | None = None
    module: AdaptedModule | None = None
    folders: dict[int, str] = field(default_factory=dict)

    def add(self, result: SweepResult) -> None:
        """Take a run and save it; its module is kept if it is the best so far."""
        number = result.number
        self.reports[number] = result.report
        if result.report.error is not None:
            return
        name = self.runs[number].name
        if self.saved is not None:
            self.folders[number] = self.saved.path(name)
            if not result.is_known:
                self.saved.save(name, result.module, result.report, result.facts)
        if self.best is None or _loss(result.report) < _loss(self.reports[self.best]):
            if result.is_known:
                result.module.load_adapter(self.folders[number])
            self.best = number
            self.module = result.module

    def best_run(self) -> tuple[AdaptedModule, TrainReport]:
        """Return the module of the best run, and its report.

        Raises:
            LoraFxError: Every run ended with a value that is not finite.
        """
        if self.best is None or self.module is None:
            raise LoraFxError(
                f"no run of {len(self.runs)} came to its end: {self.reports[0].error}",
                "lower --lr, or check the data",
                exit_code=1,
            )
        return self.module, self.reports[self.best]

    def warnings(self) -> list[str]:
        """Return the warnings of the runs but the best one's, each with its run."""
        numbers: dict[str, list[int]] = {}
        for number, report in self.reports.items():
            for warning in report.warnings:
                numbers.setdefault(warning, []).append(number)
        lines = []
        for warning, warned in numbers.items():
            if self.best in warned:
                continue
            named = ", ".join(str(number + 1) for number in warned)
            lines.append(f"run{'s' if len(warned) > 1 else ''} {named}: {warning}")
        return lines

    def known(self, number: int, facts: Facts, start: BeforeTraining) -> TrainReport | None:
        """Return the report of a run that an earlier command has finished; None if there is none.

        Raises:
            LoraFxError: The saved run is another one.
        """
        if self.saved is None:
            return None
        return self.saved.report(self.runs[number].name, facts, start)

    @contextlib.contextmanager
    def told_if_interrupted(self) -> Iterator[None]:
        """Add the saved adapters to the message if this block is interrupted."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if self.saved is not None and self.folders:
                count = f"{len(self.folders)} of {len(self.runs)}"
                stop.left = (  # type: ignore[attr-defined]
                    f"{self.saved.folder} holds {count} runs: the same command goes on from there"
                )
            raise

    def line(self, number: int) -> str:
        """Return a line on a run that is finished."""
        report = self.reports[number]
        what = f"run {number + 1} of {len(self.runs)}, {self.runs[number].name}"
        if report.error is not None:
            return f"{what}: {report.error}"
        return f"{what}: step {report.best_step}, validation loss {_loss(report):.4f}"

    def table(self) -> str:
        """Return the runs as a table in text, the best one marked."""
        names = list(self.runs[0].values)
        head = ["run", *(name.replace("_", "-") for name in names), "kept step", "validation loss"]
        rows = [[*head, ""]]
        for number, run in enumerate(self.runs):
            report = self.reports[number]
            ending = [f"{report.best_step} of {len(report.losses)}", f"{_loss(report):.4f}", ""]
            if report.error is not None:
                ending = ["", report.error, ""]
            elif number == self.best:
                ending[-1] = "best"
            rows.append([str(number + 1), *map(shown, run.values.values()), *ending])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[-1] = 0
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self._by_setting()])

    def _by_setting(self) -> list[str]:
        """Return a line for each setting that several seeds have: the mean loss, and its range."""
        losses: dict[str, list[float]] = {}
        for number, run in enumerate(self.runs):
            values = {name: value for name, value in run.values.items() if name != "seed"}
            if self.reports[number].error is None:
                losses.setdefault(replace(run, values=values).name, []).append(
                    _loss(self.reports[number])
                )
        if all(len(of_seeds) < 2 for of_seeds in losses.values()):
            return []
        lines = ["by setting, over its seeds:"]
        for name, of_seeds in losses.items():
            mean = statistics.mean(of_seeds)
            least, most = min(of_seeds), max(of_seeds)
            lines.append(f"  {name or 'all'}: {mean:.4f} ({least:.4f} to {most:.4f})")
        return lines

    def to_json(self) -> Json:
        """Return the fields of a sweep in the JSON object."""
        runs = []
        for number, run in enumerate(self.runs):
            report = self.reports[number]
            row: Json = {
                "run": number + 1,
                "options": dict(run.values),
                "adapter": self.folders.get(number),
                "error": report.error,
                **report.to_json(),
            }
            runs.append(row)
        return {"best": None if self.best is None else self.best + 1, "runs": runs}


def _loss(report: TrainReport) -> float:
    """Return the validation loss of the step that is kept."""
    return report.validation.get(report.best_step, float("inf"))


def rows_of_start(settings: Settings, processes: int) -> int:
    """Return how many examples run at a time where the first values are those of data."""
    return min(BATCH, math.ceil(settings.batch_size / (settings.accumulate * processes)))


def start_options(
    targets: TargetOptions,
    training: Table,
    loss: str | Loss,
    rows: int,
    invocation: tuple[int, ...] | None,
) -> InsertOptions:
    """Return the options of an insert, with batches where the first values are those of data.

    Args:
        targets: The options of the command.
        training: The examples.
        loss: The loss.
        rows: How many examples a batch has.
        invocation: The tokens that invoke an aLoRA.
    """
    from lora_fx.adapter.starts import OF_DATA

    if targets.init not in OF_DATA:
        return targets.insert(invocation=invocation)
    read_loss = loss if targets.init == "lora-ga" else "ce"
    return targets.insert(Batches(training, rows), read_loss, invocation)


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of one pass over the data, made anew whenever they are read.

    Attributes:
        table: The examples.
        rows: How many of them a batch has.
    """

    table: Table
    rows: int

    def __iter__(self) -> Iterator[JsonView]:
        """Yield the columns of each batch."""
        return batches_of(self.table, rows=self.rows)


@dataclass(frozen=True)
class SweepJob:
    """A sweep of the command line.

    Attributes:
        cap: The captured model.
        training: The examples.
        validation: The held-out examples.
        loss: The loss.
        defaults: The numbers of options that were not given.
        targets: The options of the branches.
        device: The device's name.
        invocation: The tokens that invoke an aLoRA.
    """

    cap: Captured
    training: Table
    validation: Table
    loss: str | Loss
    defaults: RunDefaults
    targets: TargetOptions
    device: str
    invocation: tuple[int, ...] | None = None

    def run(self, variations: Sequence[Variation], loop: SweepOptions) -> Finished:
        """Train all adapters, and save them where they are kept.

        Raises:
            LoraFxError: No run has a finite loss; and as for insert and fit.
        """
        from lora_fx.files.run_files import inputs_are_in_memory
        from lora_fx.passes.verbs.sweep import shared_base, sweep

        if self.cap.adapter is not None:
            raise LoraFxError(
                "this program holds an adapter, whose training goes on: a sweep trains new ones",
                "start from the original model",
            )
        notes: dict[str, None] = {}
        runs = [self._run_of(variation, notes) for variation in variations]
        note(*notes)
        base = shared_base(
            self.cap, runs[0].options, self.targets.quantise, self.device,
            recompute=loop.activation_checkpointing,
        )  # fmt: skip
        inputs_are_in_memory()
        lines = StepLines(say)

        def progress(number: int, step: int, steps: int, value: float) -> None:
            if number == 0:
                lines(step, steps, value)

        saved = SavedRuns(Path(loop.save_runs)) if loop.save_runs else None
        finished = Finished(variations, saved)
        results = sweep(
            base, runs, self.training, self.validation, self.loss,
            together=loop.together or 1, progress=progress,
            known=finished.known if saved else None,
        )  # fmt: skip
        with finished.told_if_interrupted():
            for result in results:
                finished.add(result)
                say(finished.line(result.number))
        note(*finished.warnings(), warns=True)
        return finished

    def _run_of(self, variation: Variation, notes: dict[str, None]) -> SweepRun:
        """Return the run of a variation; add what has to be said of it to the notes."""
        from lora_fx.passes.verbs.sweep import SweepRun

        settings = variation.loop.settings(variation.targets.seed, self.defaults)
        count = len(self.validation)
        settings, lines = with_checks(settings, variation.loop, self.defaults, self.training, count)
        notes |= dict.fromkeys(lines)
        rows = rows_of_start(settings, 1)
        options = start_options(variation.targets, self.training, self.loss, rows, self.invocation)
        return SweepRun(options, settings)


OF_A_SWEEP: Rules = (
    NoSay(
        ("together", "save_runs"),
        lambda asked: not asked["sweep"] and not asked["seeds"],
        "without --sweep or --seeds",
    ),
    NoSay(
        ("curve", "save_state", "save_every", "save_total_limit", "resume"),
        lambda asked: bool(asked["sweep"] or asked["seeds"]),
        "with --sweep or --seeds, which make several runs",
        "leave it out; --save-runs DIR keeps the adapter of every run",
    ),
)
"""Combinations in which an option has no effect and is refused."""
