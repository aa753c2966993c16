"""The options of train: its examples, its loop, and its saved states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_fx.cli.options import (
    FROM_1,
    FiniteRange,
    Rules,
    count_option,
    flag,
    label_option,
    loss_option,
    max_length_option,
    option,
    run_default,
)
from lora_fx.errors import LoraFxError, NoSay
from lora_fx.run_defaults import CAUSAL, OTHERS, RunDefaults
from lora_fx.text import JsonView

if TYPE_CHECKING:
    from lora_fx.data import Table
    from lora_fx.fx.train.settings import Saving, Settings


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """Options for the training examples, the held-out examples, and their loss."""

    label: str = label_option("Name the column to predict.")
    loss: str = loss_option()
    validation: float | None = option(
        "--validation",
        type=float,
        help=f"Hold out this share of DATA for validation.  [default: {OTHERS.held_out:g}; at most "
        f"{CAUSAL.most_held_out} examples for causal language models]",
    )
    eval_data: str | None = option(
        "--eval-data",
        metavar="FILE",
        help="Validate on these examples in place of a share of DATA.",
    )
    split_seed: int | None = option(
        "--split-seed",
        type=click.IntRange(0, 2**32 - 1),
        metavar="N",
        help="Draw the held-out examples by this seed.  [default: --seed]",
    )
    max_length: int | None = max_length_option()

    def check(self, patience: int | None) -> None:
        """Refuse, before any work, contradictory options of the held-out examples."""
        share = OTHERS.held_out if self.validation is None else self.validation
        if not 0 <= share < 1:
            raise LoraFxError(
                f"--validation {share} is not in [0, 1)", "pass --validation 0.1, for example"
            )
        if patience and not (share or self.eval_data):
            raise LoraFxError(
                "--patience needs held-out examples", "pass --validation 0.1, for example"
            )


ABOVE_0 = FiniteRange(min=0, min_open=True)
FROM_0 = FiniteRange(min=0)
SHARE = FiniteRange(min=0, max=1, max_open=True)


class OfLaunch(click.Option):
    """An option that `accelerate launch` always sets by an environment variable; --config wins."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value from the environment, unless the table of --config has the option."""
        return None if self.name in (ctx.default_map or {}) else super().resolve_envvar_value(ctx)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options for the training loop, its other outputs, and its saved states."""

    curve: str | None = option(
        "--curve",
        metavar="FILE.csv",
        help="Write the losses to a CSV file during the run: step, loss, validation.",
    )
    probe: str = option(
        "--probe",
        default="full",
        help="Write a probe of the adapter: full; short, without groups of targets; or none.",
    )
    device: str = option("--device", default="cpu", help="Train on cpu or cuda.")
    epochs: float = option(
        "--epochs", type=ABOVE_0, default=3.0, help="Set how often DATA is read through."
    )
    steps: int | None = count_option("--steps", "Set the number of steps, in place of --epochs.")
    batch_size: int | None = count_option(
        "--batch-size", f"Set how many examples a batch has.  {run_default('batch_size')}"
    )
    lr: float | None = option(
        "--lr", type=ABOVE_0, help=f"Set the highest learning rate.  {run_default('lr')}"
    )
    schedule: str = option(
        "--schedule",
        default="cosine",
        metavar="NAME",
        help="Choose how the rate changes: cosine, linear, constant, constant_with_warmup or "
        "inverse_sqrt.",
    )
    optimizer: str = option(
        "--optimizer",
        default="adamw_torch",
        metavar="NAME",
        help="Choose adamw_torch, adamw_torch_fused, sgd, rmsprop or adagrad.",
    )
    weight_decay: float = option(
        "--weight-decay",
        type=FROM_0,
        default=0.01,
        help="Set the weight decay of AdamW; a step takes it times the rate.",
    )
    warmup: float = option(
        "--warmup",
        type=SHARE,
        default=0.05,
        help="Raise the rate from 0 over this share of the steps.",
    )
    clip: float = option(
        "--clip", type=FROM_0, default=1.0, help="Scale gradients down to this norm; 0 leaves them."
    )
    checks: int | None = count_option(
        "--checks",
        f"Validate this many times in the run.  [default: {OTHERS.checks}; fewer in short runs of "
        "causal language models]",
    )
    patience: int | None = count_option(
        "--patience", "Stop after this many validations without a better loss."
    )
    accumulate: int = option(
        "--accumulate",
        type=FROM_1,
        default=1,
        metavar="N",
        cls=OfLaunch,
        envvar="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        help="Run every step in this many parts, one after another, to save memory.",
    )
    gradient_accumulation_steps: int | None = count_option(
        "--gradient-accumulation-steps",
        "Sum the gradients of this many batches of --batch-size in every step.  "
        f"{run_default('batches')}",
    )
    activation_checkpointing: bool = flag(
        "--activation-checkpointing", "Save memory: compute blocks again in the backward pass."
    )
    mixed_precision: str = option(
        "--mixed-precision",
        type=click.Choice(["no", "bf16"]),
        default="no",
        cls=OfLaunch,
        envvar="ACCELERATE_MIXED_PRECISION",
        help="bf16: compute products in bfloat16; trained tensors stay float32.",
    )
    save_state: str | None = option(
        "--save-state", metavar="DIR", help="Keep a state in this folder, for --resume."
    )
    save_every: int | None = count_option(
        "--save-every", "Save a state every N steps.  [default: at every validation]"
    )
    save_total_limit: int | None = count_option(
        "--save-total-limit",
        "Keep the last N states, as DIR/checkpoint-STEP.  [default: one, as DIR]",
    )
    resume: str | None = option(
        "--resume",
        metavar="DIR",
        help="Continue from the state in this folder, and keep saving there.",
    )

    def settings(self, seed: int, defaults: RunDefaults = OTHERS) -> Settings:
        """The settings of the loop.

        Batches that are accumulated are one larger batch that runs in as many more parts.

        Args:
            seed: That of the run.
            defaults: The numbers of options that were not given.
        """
        from lora_fx.fx.train.settings import Settings

        batch_size = self.batch_size or defaults.batch_size
        batches = self.gradient_accumulation_steps
        if batches is None:
            batches = defaults.batches if self._leaves_the_step_open() else 1
        return Settings(
            epochs=self.epochs,
            steps=self.steps,
            batch_size=batches * batch_size,
            lr=defaults.lr if self.lr is None else self.lr,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            clip=self.clip,
            checks=self.checks or defaults.checks,
            seed=seed,
            patience=self.patience,
            accumulate=batches * self.accumulate,
            mixed_precision=self.mixed_precision,
            schedule=self.schedule,
            optimizer=self.optimizer,
        )

    def _leaves_the_step_open(self) -> bool:
        """Whether no option sets the number of examples in a step, or how they run.

        A user's own --batch-size is what a step has, as it always was.
        """
        return self.batch_size is None and self.accumulate == 1

    def saving(self, *, force: bool) -> Saving:
        """Return the folder of saved states; raise, before any work, if it cannot be written."""
        from lora_fx.files.atomic import check_output
        from lora_fx.fx.train.settings import Saving
        from lora_fx.fx.train.state_folder import check_folder

        folder = self.save_state or self.resume
        if self.curve:
            check_output(self.curve, force=force)
        if (self.save_every or self.save_total_limit) and not folder:
            name = "--save-every" if self.save_every else "--save-total-limit"
            raise LoraFxError(f"{name} needs a folder for states", "pass --save-state DIR")
        if folder:
            resume = self.resume
            again = resume is not None and Path(folder).resolve() == Path(resume).resolve()
            check_folder(folder, force=force or again, own=again, limit=self.save_total_limit)
        return Saving(folder, self.save_every, self.resume, self.save_total_limit, curve=self.curve)


def with_checks(
    settings: Settings, loop: LoopOptions, defaults: RunDefaults, training: Table, held_out: int
) -> tuple[Settings, list[str]]:
    """Return settings with the number of validations, and a line where it is a smaller default.

    Args:
        settings: Those of the run.
        loop: The options; with a number of validations or a patience, nothing changes.
        defaults: The default numbers.
        training: The examples that are trained on.
        held_out: The number of examples that are held out.
    """
    if loop.checks or loop.patience:  # which counts validations
        return settings, []
    trained = settings.steps_on(training) * settings.batch_size
    checks = defaults.checks_of(trained, held_out)
    if checks == settings.checks:
        return settings, []
    times = "once" if checks == 1 else f"{checks} times"
    line = (
        f"validated {times} in the run, not {settings.checks} times (--checks): it trains on "
        f"{trained} examples, and {held_out} are held out"
    )
    return replace(settings, checks=checks), [line]


def defaults_taken(examples: ExampleOptions, loop: LoopOptions) -> list[str]:
    """Return one line with the defaults of causal language models that apply; empty if none do."""
    settings = loop.settings(0, CAUSAL)
    numbers = []
    if loop.batch_size is None:
        numbers.append(f"--batch-size {CAUSAL.batch_size}")
        if loop.accumulate > 1 and loop.gradient_accumulation_steps is None:
            numbers.append(f"{settings.batch_size} examples a step in {loop.accumulate} parts")
    if loop.gradient_accumulation_steps is None and settings.accumulate > loop.accumulate:
        numbers.append(f"--gradient-accumulation-steps {CAUSAL.batches}")
    if loop.lr is None:
        numbers.append(f"--lr {CAUSAL.lr:g}")
    if examples.max_length is None:
        numbers.append(f"at most {CAUSAL.longest} tokens of a line (--max-length)")
    if examples.validation is None and not examples.eval_data:
        numbers.append(f"at most {CAUSAL.most_held_out} examples held out (--validation)")
    if not numbers:
        return []
    return [f"defaults of causal language models: {', '.join(numbers)}"]


def _validates(asked: JsonView) -> bool:
    return asked["validation"] != 0 or bool(asked["eval_data"])


def _keeps_states(asked: JsonView) -> bool:
    """True if a state is saved whenever a validation would run."""
    return bool(asked["save_state"] or asked["resume"]) and not asked["save_every"]


TRAINED: Rules = (
    NoSay(
        ("warmup",),
        lambda asked: asked["schedule"] == "constant",
        "for --schedule constant",
        "pass --schedule constant_with_warmup",
    ),
    NoSay(
        ("validation",),
        lambda asked: bool(asked["eval_data"]),
        "with --eval-data {0[eval_data]}",
        "leave one of them out",
    ),
    NoSay(
        ("split_seed",),
        lambda asked: bool(asked["eval_data"]) or asked["validation"] == 0,
        "when no share of DATA is held out",
    ),
    NoSay(
        ("epochs",),
        lambda asked: asked["steps"] is not None,
        "with --steps {0[steps]}",
        "leave one of them out",
    ),
    NoSay(
        ("checks",),
        lambda asked: not _validates(asked) and not _keeps_states(asked),
        "when no example is held out and no validation keeps a state",
    ),
)
"""Combinations in which an option has no effect and is refused."""
