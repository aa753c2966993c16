"""Things timed in turn, A B C A B C …, and compared with the first of the same rounds.

A machine that slows down slows all of a round, so ratios are taken within rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One measurement: seconds by the clock and seconds of this process's CPU."""

    wall: float
    cpu: float


def timed(function: Callable[[], Any], repeats: int = 1) -> Sample:
    """Seconds of one call, the mean of `repeats`."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Sample(wall / repeats, cpu / repeats)


def interleave(
    runs: Mapping[str, Callable[[], T]],
    rounds: int,
    warmup: int = 1,
    before: Callable[[], None] | None = None,
) -> dict[str, list[T]]:
    """{name: what each counted round gave}; everything runs once a round, in the given order.

    Args:
        runs: Name → what measures it; the first is the baseline, a second of the same thing the
            control.
        rounds: How many are counted.
        warmup: Rounds before them that are not.
        before: Called before every run.
    """
    found: dict[str, list[T]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, measure in runs.items():
            if before:
                before()
            one = measure()
            if i >= warmup:
                found[name].append(one)
    return found


def bounds(ratios: Sequence[float]) -> tuple[float, float] | None:
    """A 95 % interval of the median, by order statistics; None under six values.

    >>> bounds([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (1.0, 6.0)
    """
    n, k = len(ratios), 0
    while sum(math.comb(n, i) for i in range(k + 1)) / 2**n <= 0.025:
        k += 1
    ranked = sorted(ratios)
    return (ranked[k - 1], ranked[n - k]) if k else None


def summary(mine: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Median and minimum in seconds, and their ratios to the baseline's.

    `lower` and `upper` bound the median of the ratios within rounds with 95 % confidence; null
    under six rounds.
    """
    interval = bounds([a / b for a, b in zip(mine, base, strict=True)])
    return {
        "median": statistics.median(mine),
        "min": min(mine),
        "ratio": statistics.median(mine) / statistics.median(base),
        "min_ratio": min(mine) / min(base),
        "lower": interval[0] if interval else None,
        "upper": interval[1] if interval else None,
    }
