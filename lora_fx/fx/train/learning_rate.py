"""The learning rate of a run, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable


def _cosine(step: int, rise: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * _done(step, rise, steps)))


def _linear(step: int, rise: int, steps: int) -> float:
    return 1 - _done(step, rise, steps)


def _constant(step: int, rise: int, steps: int) -> float:
    return 1.0


def _inverse_sqrt(step: int, rise: int, steps: int) -> float:
    if rise:
        return float((rise / step) ** 0.5)
    return float((10_000 / (step + 10_000)) ** 0.5)


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "inverse_sqrt": _inverse_sqrt,
}
"""The share of the rate after the warm-up, by transformers' names, of (step, warm-up, steps)."""


def factor(step: int, steps: int, warmup: float, schedule: str = "cosine") -> float:
    """The share of the learning rate at a step, counted from 0.

    transformers' own after the warm-up. In it a step has the share that the next one has there,
    where the first step moves nothing.
    """
    rise = 0 if schedule == "constant" else math.ceil(steps * warmup)
    if step < rise:
        return (step + 1) / rise
    return SCHEDULES[schedule](step, rise, steps)


def _done(step: int, rise: int, steps: int) -> float:
    """The share of the steps after the warm-up that come before this step."""
    return (step - rise) / max(1, steps - rise)
