"""The learning rate of a run, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "cosine": lambda at, rise, steps: 0.5 * (1 + math.cos(math.pi * _done(at, rise, steps))),
    "linear": lambda at, rise, steps: 1 - _done(at, rise, steps),
    "constant": lambda at, rise, steps: 1.0,
    "constant_with_warmup": lambda at, rise, steps: 1.0,
    "inverse_sqrt": lambda at, rise, steps: ((rise or 10_000) / (at + 10_000 * (not rise))) ** 0.5,
}
"""The share of the rate after the warm-up, by transformers' names, of (step, warm-up, steps)."""


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
