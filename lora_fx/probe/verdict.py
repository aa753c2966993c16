"""The verdict on a run: which of the things that a probe knows of an adapter it has computed.

docs/probe.md has the rules, with these numbers. All lists here are a run's outputs at the points of
the probe, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_fx.dtypes import Array

RIGHT = "right"
TOO_SMALL = "too small to tell"
CANNOT_TELL = "cannot tell"
"""The verdict on quantised weights, whose outputs differ by more than was measured."""
NO_EFFECT = "no effect"
NOT_FINITE = "not finite"
DIFFERS = "differs"
UNCHECKED_IDS = "ids are not checked"
SCALED = "scaled by "
OR = " or "
SHARE_OF_EFFECT = 0.02
"""The distance from a fitted scale's outputs, as a share of the adapter's effect."""
BETTER = 8.0
"""How many times nearer a fitted scale has to be than the adapter as it is."""
NEAR_ONE = 0.1
"""A scale so near to 1 is told by the direction of the change, and not by the cubic."""
FEWEST_MOVED = 8
"""The number of points that an adapter has to move for a scale to be told: a few fit any scale."""
SCALES = np.arange(10, 301) / 100
"""The scales that are tried: 0.10, 0.11 … 3.00."""


class Verdict(str):
    """The text of a verdict, with its parts: names in the text may hold the words that join them.

    Attributes:
        causes: What may have been computed, such as "no effect" and "adapter C"; empty where the
            verdict is a word of its own.
        precision: The precision in which it is so; empty for the file's own.
    """

    causes: tuple[str, ...]
    precision: str

    def __new__(cls, word: str = "", causes: Sequence[str] = (), precision: str = "") -> Verdict:
        """Make a verdict of a word, or of causes."""
        text = word or OR.join(causes)
        self = super().__new__(cls, f"{text} in {precision}" if precision else text)
        self.causes = tuple(causes)
        self.precision = precision
        return self

    @property
    def is_right(self) -> bool:
        """Whether the outputs are right, in whatever precision."""
        return not self.causes and self == Verdict(RIGHT, precision=self.precision)


OVERFLOWS = np.errstate(over="ignore", invalid="ignore")
"""Numbers of a file may be so large that their difference is infinite, which is far enough."""


@dataclass(frozen=True)
class Gauge:
    """How numbers at the points of a probe are compared.

    Attributes:
        largest: The largest magnitude of each point's output.
        tolerance: What each point's output may differ by, as a share of `largest`.
        precisions: How far outputs move in another precision, as shares of `largest`.
        other_tolerance: The largest tolerance of outputs without points; 0 where there are none.
    """

    largest: Array
    tolerance: Array
    precisions: Mapping[str, float] = field(default_factory=dict)
    other_tolerance: float = 0.0

    @property
    def largest_tolerance(self) -> float:
        """The largest tolerance of all outputs."""
        return max(float(self.tolerance.max()), self.other_tolerance)

    @OVERFLOWS
    def distance(self, found: Array, expected: Array) -> float:
        """Return the largest difference as a share of `largest`; infinite where one is NaN."""
        return _largest(np.abs(found - expected) / self.largest)

    @OVERFLOWS
    def excess(self, found: Array, expected: Array) -> float:
        """Return the largest difference as a multiple of what it may be."""
        return _largest(np.abs(found - expected) / (self.largest * self.tolerance))

    def apart(self, one: Array, other: Array, level: float) -> bool:
        """Whether no numbers are within a level of both lists."""
        return self.distance(one, other) > 2 * level


@dataclass(frozen=True)
class Known:
    """What a probe knows of one adapter.

    Attributes:
        expected: The outputs with the adapter.
        base: Those of the base, where they are known.
        others: Those with each other adapter, by its name.
        groups: Those without each group of targets.
        half: Those with all changes multiplied by 0.5, where they are known.
        double: Those with all changes multiplied by 2.
    """

    expected: Array
    base: Array | None = None
    others: Mapping[str, Array] = field(default_factory=dict)
    groups: Mapping[str, Array] = field(default_factory=dict)
    half: Array | None = None
    double: Array | None = None

    def causes(self) -> dict[str, Array]:
        """Return the outputs of each cause of a difference, in the order of docs/probe.md."""
        causes: dict[str, Array] = {}
        if self.base is not None:
            causes[NO_EFFECT] = self.base
        for name, values in self.others.items():
            causes[f"adapter {name}"] = values
        for name, values in self.groups.items():
            causes[f"without {name}"] = values
        if self.half is not None:
            causes[f"{SCALED}0.5"] = self.half
        if self.double is not None:
            causes[f"{SCALED}2"] = self.double
        return causes


def verdict_on_adapter(found: Array, known: Known, gauge: Gauge) -> Verdict:
    """Return the verdict on a run with an adapter."""
    causes = known.causes()
    verdict = _exactly(found, known.expected, causes, gauge)
    if verdict == RIGHT and not _shows(known, gauge):
        return Verdict(TOO_SMALL)
    if verdict is not None:
        return verdict
    scale = scale_near_one(found, known, gauge)
    if scale is not None:
        return Verdict(causes=[f"{SCALED}{scale:g}"])
    verdict = _in_a_precision(found, known.expected, causes, known.base, gauge)
    if verdict is not None:
        return verdict
    scale = fitted_scale(found, known, gauge)
    if scale is not None:
        return Verdict(causes=[f"{SCALED}{scale:g}"])
    return Verdict(DIFFERS)


def _shows(known: Known, gauge: Gauge) -> bool:
    """Whether the outputs with an adapter can be told from those of the base, where known."""
    if known.base is None:
        return True
    return gauge.apart(known.expected, known.base, gauge.largest_tolerance)


def verdict_on_base(
    found: Array, base: Array, adapters: Mapping[str, Array], gauge: Gauge
) -> Verdict:
    """Return the verdict on a run of the base; `adapters` are the outputs with each adapter."""
    causes = {f"adapter {name}": values for name, values in adapters.items()}
    verdict = _exactly(found, base, causes, gauge)
    if verdict is None:
        verdict = _in_a_precision(found, base, causes, None, gauge)
    return Verdict(DIFFERS) if verdict is None else verdict


def _exactly(
    found: Array, expected: Array, causes: Mapping[str, Array], gauge: Gauge
) -> Verdict | None:
    """Return the verdict where what is expected, or a cause, explains a run to the tolerance."""
    if not np.isfinite(found).all():
        return Verdict(NOT_FINITE)
    if gauge.excess(found, expected) <= 1:
        return Verdict(RIGHT)
    matching = [name for name, values in causes.items() if gauge.excess(found, values) <= 1]
    return Verdict(causes=matching) if matching else None


def _in_a_precision(
    found: Array,
    expected: Array,
    causes: Mapping[str, Array],
    base: Array | None,
    gauge: Gauge,
) -> Verdict | None:
    """Return the verdict where a precision explains a run.

    Args:
        found: The run.
        expected: What it should be.
        causes: The outputs of each cause of a difference.
        base: The base's outputs: a precision is no explanation where it hides their difference.
        gauge: How numbers are compared.
    """
    for precision, level in sorted(gauge.precisions.items(), key=lambda row: row[1]):
        if base is not None and not gauge.apart(expected, base, 2 * level):
            continue
        if gauge.distance(found, expected) <= level:
            return Verdict(RIGHT, precision=precision)
        matching = [
            name for name, values in causes.items() if gauge.distance(found, values) <= level
        ]
        if matching:
            return Verdict(causes=matching, precision=precision)
    return None


@OVERFLOWS
def scale_near_one(found: Array, known: Known, gauge: Gauge) -> float | None:
    """Return a scale within NEAR_ONE of 1 that explains a run; None where none does.

    So near to 1 the outputs move along the adapter's own effect, which no rounding does.
    """
    if known.base is None or not _moves_enough(known, gauge):
        return None
    effect = (known.expected - known.base) / gauge.largest
    difference = (found - known.expected) / gauge.largest
    share = float(difference @ effect / (effect @ effect))
    left_over = _largest(np.abs(difference - share * effect))
    scale = np.floor(100 * (1 + share) + 0.5) / 100
    explains = left_over <= _largest(np.abs(difference)) / BETTER
    return float(scale) if explains and abs(share) <= NEAR_ONE and scale != 1 else None


def _moves_enough(known: Known, gauge: Gauge) -> bool:
    """Whether an adapter moves so many points that a scale can be told."""
    assert known.base is not None  # a scale is of a change of it
    moved = np.abs(known.expected - known.base) > gauge.largest * gauge.tolerance
    return int(moved.sum()) >= FEWEST_MOVED


@OVERFLOWS
def fitted_scale(found: Array, known: Known, gauge: Gauge) -> float | None:
    """Return the scale of an adapter's changes that explains a run; None where none does.

    Every output is a cubic function of the scale, through what is known at 0, 0.5, 1 and 2.
    """
    if known.base is None or known.half is None or known.double is None:
        return None
    if not _moves_enough(known, gauge):
        return None
    known_scales = (0.0, 0.5, 1.0, 2.0)
    lists = (known.base, known.half, known.expected, known.double)
    distances = []
    for scale in SCALES:
        values = np.zeros_like(known.base)
        for at, outputs in zip(known_scales, lists, strict=True):
            values = values + _lagrange(float(scale), at, known_scales) * outputs
        distances.append(gauge.distance(found, values))

    nearest = int(np.argmin(distances))
    scale = float(SCALES[nearest])
    effect = gauge.distance(known.expected, known.base)
    unscaled = gauge.distance(found, known.expected)
    explains = distances[nearest] <= min(SHARE_OF_EFFECT * effect, unscaled / BETTER)
    return scale if explains and abs(scale - 1) > NEAR_ONE + 1e-9 else None


def _lagrange(scale: float, at: float, scales: Sequence[float]) -> float:
    """Return the weight at `scale` of what is known at one of the scales."""
    weight = 1.0
    for other in scales:
        if other != at:
            weight *= (scale - other) / (at - other)
    return weight


def _largest(differences: Array) -> float:
    """Return the largest difference; infinite where one is NaN, 0 for none."""
    if not differences.size:
        return 0.0
    largest = float(differences.max())
    return largest if np.isfinite(largest) else float("inf")
