"""The options of train: its examples, its loop, and its saved states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_fx.cli.options import (
    FROM_1,
    Rules,
    count_option,
    flag,
    label_option,
    loss_option,
    max_length_option,
    option,
)
from lora_fx.errors import LoraFxError, NoSay
from lora_fx.text import JsonView

if TYPE_CHECKING:
    from lora_fx.fx.train.settings import Saving, Settings


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """Options for the training examples, the held-out examples, and their loss."""

    label: str = label_option("Column to predict.")
    loss: str = loss_option()
    validation: float = option("--validation", type=float, default=0.1, help="Share held out.")
    eval_data: str | None = option(
        "--eval-data", metavar="FILE", help="Held-out examples, instead of a share of DATA."
    )
    max_length: int | None = max_length_option()

    def check(self, patience: int | None) -> None:
        """Refuse, before any work, contradictory options of the held-out examples."""
        if not 0 <= self.validation < 1:
            raise LoraFxError(f"--validation {self.validation} is not in [0, 1)", "0.1 is usual")
        if patience and not (self.validation or self.eval_data):
            raise LoraFxError("--patience needs held-out examples", "--validation 0.1 is usual")


ABOVE_0 = click.FloatRange(min=0, min_open=True)
FROM_0 = click.FloatRange(min=0)
SHARE = click.FloatRange(min=0, max=1, max_open=True)


class OfLaunch(click.Option):
    """An option that `accelerate launch` always sets by environment; --config wins over that."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value from the environment, unless the table of --config has the option."""
        return None if self.name in (ctx.default_map or {}) else super().resolve_envvar_value(ctx)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options for the training loop, its other outputs, and its saved states."""

    curve: str | None = option(
        "--curve", metavar="FILE.csv", help="Write the losses: step, loss, validation."
    )
    device: str = option("--device", default="cpu", help="cpu or cuda.")
    epochs: float = option("--epochs", type=ABOVE_0, default=3.0, help="Passes over DATA.")
    steps: int | None = count_option("--steps", "Steps, instead of epochs.")
    batch_size: int = option("--batch-size", type=FROM_1, default=32, help="Examples a step.")
    lr: float = option("--lr", type=ABOVE_0, default=1e-3, help="Peak learning rate.")
    schedule: str = option(
        "--schedule",
        default="cosine",
        metavar="NAME",
        help="Of the rate: cosine, linear, constant, constant_with_warmup or inverse_sqrt.",
    )
    optimizer: str = option(
        "--optimizer",
        default="adamw_torch",
        metavar="NAME",
        help="adamw_torch, adamw_torch_fused, sgd, rmsprop or adagrad.",
    )
    weight_decay: float = option(
        "--weight-decay", type=FROM_0, default=0.01, help="Of AdamW, times the rate."
    )
    warmup: float = option(
        "--warmup", type=SHARE, default=0.05, help="Share of the steps that warm up."
    )
    clip: float = option(
        "--clip", type=FROM_0, default=1.0, help="Longest gradient (norm); 0 for any."
    )
    checks: int = option("--checks", type=FROM_1, default=10, help="Validations in the run.")
    patience: int | None = count_option("--patience", "Validations in vain that end the run.")
    accumulate: int = option(
        "--accumulate",
        type=FROM_1,
        default=1,
        metavar="N",
        cls=OfLaunch,
        envvar="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        help="Parts that a step runs in, one after another, to save memory.",
    )
    gradient_accumulation_steps: int = count_option(
        "--gradient-accumulation-steps", "Batches of --batch-size that make one step.", 1
    )
    activation_checkpointing: bool = flag(
        "--activation-checkpointing", "Recompute blocks in backward."
    )
    mixed_precision: str = option(
        "--mixed-precision",
        type=click.Choice(["no", "bf16"]),
        default="no",
        cls=OfLaunch,
        envvar="ACCELERATE_MIXED_PRECISION",
        help="bf16: products in bfloat16; what is trained stays float32.",
    )
    save_state: str | None = option(
        "--save-state", metavar="DIR", help="Keep a state there to --resume from."
    )
    save_every: int | None = count_option(
        "--save-every", "Steps between two states.  [default: one at every validation]"
    )
    save_total_limit: int | None = count_option(
        "--save-total-limit",
        "Keep the last N states, as DIR/checkpoint-STEP.  [default: the last, as DIR]",
    )
    resume: str | None = option(
        "--resume", metavar="DIR", help="Go on from a state; it is kept current there."
    )

    def settings(self, seed: int) -> Settings:
        """The settings of the loop.

        Batches that are accumulated are one larger batch that runs in as many more parts.
        """
        from lora_fx.fx.train.settings import Settings

        batches = self.gradient_accumulation_steps
        return Settings(
            epochs=self.epochs,
            steps=self.steps,
            batch_size=batches * self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            clip=self.clip,
            checks=self.checks,
            seed=seed,
            patience=self.patience,
            accumulate=batches * self.accumulate,
            mixed_precision=self.mixed_precision,
            schedule=self.schedule,
            optimizer=self.optimizer,
        )

    def saving(self, *, force: bool) -> Saving:
        """The folder of saved states; raises, before any work, if it cannot be written."""
        from lora_fx.files.atomic import check_output
        from lora_fx.fx.train.settings import Saving
        from lora_fx.fx.train.state_folder import check_folder

        folder = self.save_state or self.resume
        if self.curve:
            check_output(self.curve, force=force)
        if (self.save_every or self.save_total_limit) and not folder:
            name = "--save-every" if self.save_every else "--save-total-limit"
            raise LoraFxError(f"{name}, but no state is kept", "--save-state DIR")
        if folder:
            resume = self.resume
            again = resume is not None and Path(folder).resolve() == Path(resume).resolve()
            check_folder(folder, force=force or again, own=again, limit=self.save_total_limit)
        return Saving(folder, self.save_every, self.resume, self.save_total_limit)


def _validates(asked: JsonView) -> bool:
    return bool(asked["validation"] or asked["eval_data"])


def _keeps_states(asked: JsonView) -> bool:
    """True if a state is saved whenever a validation would run."""
    return bool(asked["save_state"] or asked["resume"]) and not asked["save_every"]


TRAINED: Rules = (
    NoSay(
        ("warmup",),
        lambda asked: asked["schedule"] == "constant",
        "for --schedule constant",
        "--schedule constant_with_warmup has one",
    ),
    NoSay(
        ("validation",),
        lambda asked: bool(asked["eval_data"]),
        "beside --eval-data {0[eval_data]}",
        "leave one of them out",
    ),
    NoSay(
        ("epochs",),
        lambda asked: asked["steps"] is not None,
        "beside --steps {0[steps]}",
        "leave one of them out",
    ),
    NoSay(
        ("checks",),
        lambda asked: not _validates(asked) and not _keeps_states(asked),
        "where no example is held out, and no state is kept at a validation",
    ),
)
"""Combinations in which an option has no effect and is refused."""
