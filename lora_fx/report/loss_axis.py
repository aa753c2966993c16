"""The vertical axis of a plot of losses: linear, or logarithmic where they span decades."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SPAN = 30.0
"""The ratio of the largest loss to the least from which on the axis is logarithmic."""
FEW = 3
"""The fewest powers of ten that are marked alone; with fewer, 2 and 5 times them are, too."""
MANY = 8
"""The most marks of powers of ten, whose labels would otherwise cover each other."""


@dataclass(frozen=True)
class LossAxis:
    """Where a loss stands on a plot.

    Attributes:
        low: The loss at its foot.
        high: The loss at its top.
        ticks: The marked losses, from the least to the largest.
        is_logarithmic: Whether equal ratios are equally far apart.
    """

    low: float
    high: float
    ticks: Sequence[float]
    is_logarithmic: bool

    @classmethod
    def of(cls, losses: Sequence[float]) -> LossAxis:
        """Return the axis for finite losses; all have to be above zero for a logarithmic one."""
        low = min(losses, default=0.0)
        high = max(losses, default=1.0)
        if low > 0 and high / low >= SPAN:
            marks = _marks(low, high)
            powers = [mark for mark in marks if math.log10(mark).is_integer()]
            every = math.ceil(len(powers) / MANY)
            return cls(marks[0], marks[-1], powers[::every] if len(powers) >= FEW else marks, True)
        ticks = round_ticks(losses)
        return cls(ticks[0], ticks[-1], ticks, False)

    def depth(self, loss: float) -> float:
        """Return how far below the top a loss stands, as a share of the height."""
        scale: Callable[[float], float] = math.log10 if self.is_logarithmic else float
        height = scale(self.high) - scale(self.low)
        return (scale(self.high) - scale(loss)) / height

    def labels(self) -> list[tuple[str, str]]:
        """Return the text of each mark, and its depth in per cent."""
        return [(f"{tick:g}", f"{100 * self.depth(tick):.1f}") for tick in self.ticks]


def _marks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten, from one below two losses to one above them.

    >>> _marks(0.3, 12.0)
    [0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    foot = max(mark for mark in marks if mark <= low)
    top = min(mark for mark in marks if mark >= high)
    return [mark for mark in marks if foot <= mark <= top]


def round_ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers from below the least value to above the largest.

    >>> round_ticks([0.31, 0.94])
    [0.2, 0.4, 0.6, 0.8, 1.0]
    """
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    if high - low <= 1e-9 * abs(high):
        low -= (abs(low) or 1) / 10
        high += (abs(high) or 1) / 10
    step = round_step((high - low) / 4)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [float(f"{count * step:.12g}") for count in range(first, last + 1)]


def round_step(rough: float) -> float:
    """Return the least of 1, 2, 5 and 10 times a power of ten that is at least `rough`."""
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= rough * (1 - 1e-9))
