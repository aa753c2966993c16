"""An optimizer at the variant's rates, along a warm-up and a schedule; its moments by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.text import Json

Made = tuple[Callable[..., torch.optim.Optimizer], Json, tuple[str, ...]]
"""A class of torch, its arguments, and what it holds of a tensor; `step` is a number."""
OPTIMIZERS: dict[str, Made] = {
    "adamw_torch": (torch.optim.AdamW, {}, ("exp_avg", "exp_avg_sq", "step")),
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}, ("exp_avg", "exp_avg_sq", "step")),
    "sgd": (torch.optim.SGD, {}, ()),
    "rmsprop": (torch.optim.RMSprop, {}, ("square_avg", "step")),
    "adagrad": (torch.optim.Adagrad, {}, ("sum", "step")),
}
"""Optimizers by transformers' names, with the values that its Trainer gives them."""
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "cosine": lambda at, rise, steps: 0.5 * (1 + math.cos(math.pi * _done(at, rise, steps))),
    "linear": lambda at, rise, steps: 1 - _done(at, rise, steps),
    "constant": lambda at, rise, steps: 1.0,
    "constant_with_warmup": lambda at, rise, steps: 1.0,
    "inverse_sqrt": lambda at, rise, steps: ((rise or 10_000) / (at + 10_000 * (not rise))) ** 0.5,
}
"""The share of the rate after the warm-up, by transformers' names, of (step, warm-up, steps)."""


class Optimizer:
    """The optimizer of a run.

    Args:
        model: From insert; what requires grad is trained.
        settings: Learning rate, weight decay, warm-up, schedule.
        steps: The steps of the whole run.
    """

    def __init__(self, model: AdaptedModule, settings: Settings, steps: int) -> None:
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        make, given, self.fields = OPTIMIZERS[settings.optimizer]
        groups = model.parameter_groups(settings.lr, settings.weight_decay)
        self._inner = make(groups, lr=settings.lr, **given)
        self._peaks = [group["lr"] for group in self._inner.param_groups]
        self._steps, self._settings = steps, settings

    @property
    def trained(self) -> list[nn.Parameter]:
        """What it moves."""
        return list(self.named.values())

    def clear(self) -> None:
        """Forget the gradients."""
        self._inner.zero_grad()

    def take(self, step: int) -> None:
        """Take a step, counted from 1, with the gradients as they are."""
        share = factor(step - 1, self._steps, self._settings.warmup, self._settings.schedule)
        for group, peak in zip(self._inner.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        self._inner.step()

    @property
    def moved(self) -> list[str]:
        """Names of what has moments: all but what never had a gradient."""
        return [name for name, p in self.named.items() if self._inner.state.get(p)]

    def moments(self) -> dict[str, torch.Tensor]:
        """`NAME/exp_avg` … of every tensor that has moved."""
        state = self._inner.state
        return {
            f"{n}/{field}": state[self.named[n]][field] for n in self.moved for field in self.fields
        }

    def like(self, name: str) -> dict[str, torch.Tensor]:
        """A tensor of the shape, dtype and device of each moment of one tensor, by field."""
        p = self.named[name]
        step = torch.zeros((), device=p.device if self._inner.defaults.get("fused") else "cpu")
        return {field: step if field == "step" else p for field in self.fields}

    def put(self, name: str, moments: dict[str, torch.Tensor]) -> None:
        """Go on from such moments of one tensor, by field."""
        self._inner.state[self.named[name]] = dict(moments)


def factor(step: int, steps: int, warmup: float, schedule: str = "cosine") -> float:
    """The share of the learning rate at a step, counted from 0.

    transformers' own after the warm-up. In it a step has the share that the next one has there,
    where the first step moves nothing.
    """
    rise = 0 if schedule == "constant" else math.ceil(steps * warmup)
    return (step + 1) / rise if step < rise else SCHEDULES[schedule](step, rise, steps)


def _done(step: int, rise: int, steps: int) -> float:
    """The share of the steps after the warm-up that lie before this one."""
    return (step - rise) / max(1, steps - rise)


@dataclass(frozen=True)
class Settings:
    """What `fit` may be told. `steps` overrides `epochs`; validation runs `checks` times.

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

    def __post_init__(self) -> None:
        """Refuse a name that is not known."""
        for what, names in (("schedule", list(SCHEDULES)), ("optimizer", list(OPTIMIZERS))):
            if (name := getattr(self, what)) not in names:
                raise LoraFxError(f"no {what} {name!r}", f"one of {', '.join(names)}")
