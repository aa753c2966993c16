"""AdamW at the variant's rates, along a warm-up and half a cosine; its moments by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.fx.module.adapted import AdaptedModule

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW holds of a tensor; the last is a number."""


class Optimizer:
    """The optimizer of a run.

    Args:
        model: From insert; what requires grad is trained.
        settings: Learning rate, weight decay, warm-up.
        steps: The steps of the whole run.
    """

    def __init__(self, model: AdaptedModule, settings: Settings, steps: int) -> None:
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._adam = torch.optim.AdamW(
            model.parameter_groups(settings.lr, settings.weight_decay), lr=settings.lr
        )
        self._peaks = [group["lr"] for group in self._adam.param_groups]
        self._steps, self._warmup = steps, settings.warmup

    @property
    def trained(self) -> list[nn.Parameter]:
        """What it moves."""
        return list(self.named.values())

    def clear(self) -> None:
        """Forget the gradients."""
        self._adam.zero_grad()

    def take(self, step: int) -> None:
        """Take a step, counted from 1, with the gradients as they are."""
        share = factor(step - 1, self._steps, self._warmup)
        for group, peak in zip(self._adam.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        self._adam.step()

    @property
    def moved(self) -> list[str]:
        """Names of what has moments: all but what never had a gradient."""
        return [name for name, p in self.named.items() if self._adam.state.get(p)]

    def moments(self) -> dict[str, torch.Tensor]:
        """`NAME/exp_avg` … of every tensor that has moved."""
        state = self._adam.state
        return {
            f"{n}/{field}": state[self.named[n]][field] for n in self.moved for field in MOMENTS
        }

    def put(self, name: str, moments: dict[str, torch.Tensor]) -> None:
        """Go on from such moments of one tensor, by field."""
        self._adam.state[self.named[name]] = dict(moments)


def factor(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at a step, counted from 0: a line up, half a cosine down."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass(frozen=True)
class Settings:
    """What `fit` may be told. `steps` overrides `epochs`; validation runs `checks` times.

    Args:
        epochs: Passes over the training data.
        steps: Steps of the optimizer, instead of epochs.
        batch_size: Examples a step, of all processes together.
        lr: Highest learning rate of a; the variant says that of b.
        weight_decay: What a weight loses in a step of AdamW is lr · weight_decay of itself.
        warmup: Share of the steps in which the rate rises; then it falls as half a cosine.
        clip: The longest gradient, as the norm of all of them together; 0 clips nothing.
        checks: Validations in a run.
        seed: The seed of dropout and of the order of the examples.
        patience: Validations in a row without a new lowest loss that end the run.
        accumulate: Parts that a process's share of a step runs in, one after another.
        mixed_precision: no, or bf16: products in bfloat16, what is trained stays float32.
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
