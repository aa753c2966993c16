"""The settings of a run, and the folder of its saved state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lora_fx.data import Buckets, Table
from lora_fx.errors import LoraFxError
from lora_fx.fx.train.learning_rate import SCHEDULES
from lora_fx.fx.train.torch_optimizers import OPTIMIZERS
from lora_fx.fx.train.train_report import TrainReport
from lora_fx.text import JsonView


@dataclass(frozen=True)
class Settings:
    """The settings of `fit`; `steps` overrides `epochs`, and validation runs `checks` times.

    Args:
        epochs: Passes over the training data.
        steps: Steps of the optimizer, instead of epochs.
        batch_size: Examples a step, of all processes together.
        lr: Highest learning rate of a; the variant says that of b.
        weight_decay: What a weight loses in a step of AdamW is lr · weight_decay of itself.
        warmup: Share of the steps in which the rate rises; then the schedule has it.
        clip: The longest gradient, as the norm of all of them together; 0 clips nothing.
        checks: Validations in a run.
        seed: The seed of dropout and of the order of the examples.
        patience: Validations in a row without a new lowest loss that end the run.
        accumulate: Parts that a process's share of a step runs in, one after another.
        mixed_precision: no, or bf16: products in bfloat16, what is trained stays float32.
        schedule: A name in SCHEDULES.
        optimizer: A name in OPTIMIZERS.

    Raises:
        LoraFxError: A schedule or an optimizer that is not known.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    checks: int = 10
    seed: int = 0
    patience: int | None = None
    accumulate: int = 1
    mixed_precision: str = "no"
    schedule: str = "cosine"
    optimizer: str = "adamw_torch"

    def steps_on(self, training: Table | Buckets) -> int:
        """Return the number of steps of a run on some data."""
        return self.steps or math.ceil(self.epochs * training.count(self.batch_size))

    def __post_init__(self) -> None:
        """Raise for an unknown schedule or optimizer."""
        _expect("schedule", self.schedule, list(SCHEDULES))
        _expect("optimizer", self.optimizer, list(OPTIMIZERS))


def _expect(kind: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise LoraFxError(f"unknown {kind} {name!r}", f"use one of {', '.join(names)}")


Watch = Callable[[TrainReport, int, JsonView], None]
"""A function that is called with a run's losses so far, its number of steps, and its facts.

The facts are what a resumed state must share; they are empty for a run without states.
"""


@dataclass(frozen=True)
class Saving:
    """The folder in which a run saves its state, and the state that the run resumes.

    Args:
        folder: The folder that is written, and replaced; None for none.
        every: Steps between two states; None for one at every validation.
        resume: The state of an earlier run to go on from.
        limit: How many states are kept, the last ones, as `checkpoint-STEP` in the folder; None
            for one, which is the folder itself.
        curve: The .csv file of the losses so far, written at every validation.
        watch: Called at every validation but the last.
    """

    folder: str | None = None
    every: int | None = None
    resume: str | None = None
    limit: int | None = None
    curve: str | None = None
    watch: Watch | None = None
