"""AdamW at the variant's rates, along a warm-up and half a cosine; its moments by name."""

from __future__ import annotations

import math

import torch
from torch import nn

from lora_fx.fx.adapted import AdaptedModule
from lora_fx.fx.train_settings import Settings

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW holds of a tensor; the last is a number."""


class Optimizer:
    """The optimizer of a run.

    Args:
        model: From insert; what requires grad is trained.
        settings: Learning rate, weight decay, warm-up.
        steps: Of the whole run.
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

    def moments(self) -> dict[str, torch.Tensor]:
        """`NAME/exp_avg` … of every tensor that has moved."""
        return {
            f"{name}/{field}": self._adam.state[p][field]
            for name, p in self.named.items()
            for field in MOMENTS
            if self._adam.state.get(p)
        }

    def put(self, moments: dict[str, torch.Tensor]) -> None:
        """Go on from such moments."""
        for name, p in self.named.items():
            if f"{name}/{MOMENTS[0]}" not in moments:
                continue
            found = {field: moments[f"{name}/{field}"] for field in MOMENTS}
            count = found.pop("step").clone()  # stays on the CPU
            self._adam.state[p] = {"step": count} | {k: v.to(p.device) for k, v in found.items()}


def factor(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at a step, counted from 0: a line up, half a cosine down."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
