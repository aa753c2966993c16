"""Runs timed in turn, A B C A B C …, and compared with the first of the same round.

A machine that slows down slows all of a round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lora_fx.text import Json

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One measurement: seconds by the clock and seconds of this process's CPU."""

    wall: float
    cpu: float


def timed(function: Callable[[], object], repeats: int = 1) -> Sample:
    """Seconds that one call takes, as the mean over `repeats` calls."""
    wall_start = time.perf_counter()
    cpu_start = time.process_time()
    for _ in range(repeats):
        function()
    cpu = time.process_time() - cpu_start
    wall = time.perf_counter() - wall_start
    if not cpu:  # some systems count it in steps of ten milliseconds
        cpu = wall
    return Sample(wall / repeats, cpu / repeats)


def interleave(
    runs: Mapping[str, Callable[[], T]],
    rounds: int,
    warmup: int = 1,
    before: Callable[[], None] | None = None,
) -> dict[str, list[T]]:
    """Run everything once in each round, in the given order; returns the results of counted rounds.

    Args:
        runs: Name → a function that measures; the first is the baseline, and a second one of the
            same thing the control.
        rounds: How many rounds are counted.
        warmup: How many rounds before them are not.
        before: A function that is called before every run.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        for name, measure in runs.items():
            if before:
                before()
            result = measure()
            if number >= warmup:
                results[name].append(result)
    return results


def bounds(ratios: Sequence[float]) -> tuple[float, float] | None:
    """A 95 % interval of the median, by order statistics; None under six values.

    >>> bounds([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (1.0, 6.0)
    """
    count = len(ratios)
    # the largest k for which the median lies below the k-th smallest value with a probability of
    # 2.5 % at most: so it does where fewer than k values of `count` fall below it
    k = 0
    outcomes = 1
    while outcomes / 2**count <= 0.025:
        k += 1
        outcomes += math.comb(count, k)
    if k == 0:
        return None
    ranked = sorted(ratios)
    return ranked[k - 1], ranked[count - k]


def summary(mine: Sequence[float], base: Sequence[float]) -> Json:
    """Median and minimum in seconds, and their ratios to the baseline's.

    `lower` and `upper` bound the median of the ratios within rounds with 95 % confidence; null
    under six rounds.
    """
    ratios = [seconds / base_seconds for seconds, base_seconds in zip(mine, base, strict=True)]
    lower, upper = bounds(ratios) or (None, None)
    return {
        "median": statistics.median(mine),
        "min": min(mine),
        "ratio": statistics.median(mine) / statistics.median(base),
        "min_ratio": min(mine) / min(base),
        "lower": lower,
        "upper": upper,
    }
