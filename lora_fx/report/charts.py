"""Losses by step, with the kept step marked; bars of what rounding lost; spectra of updates.

The functions work out paths and labels; templates/charts.html.j2 draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeGuard

from markupsafe import Markup

from lora_fx.report.formatting import number, percent, plural
from lora_fx.report.rows import Row
from lora_fx.text import JsonView, is_number

POINTS = 400
"""The most points of a drawn line; a longer run is drawn as means of equal spans."""
WIDE = 1000
HIGH = 300
"""Units of a drawing."""


class _Axes(NamedTuple):
    """The scales of the training curves.

    Attributes:
        last_step: The step at the right edge.
        low: The loss at the bottom.
        high: The loss at the top.
    """

    last_step: int
    low: float
    high: float

    def x(self, step: float) -> float:
        """Where a step lies, in units of the drawing."""
        return WIDE * step / max(1, self.last_step)

    def y(self, loss: float) -> float:
        """Where a loss lies, in units of the drawing from the top."""
        return HIGH * (self.high - loss) / (self.high - self.low)

    def places(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Where points of (step, loss) lie."""
        return [(self.x(step), self.y(loss)) for step, loss in points]


def training(result: JsonView) -> JsonView | None:
    """The training curves; None where nothing was trained."""
    losses = result.get("losses")
    validation = result.get("validation")
    if not isinstance(losses, list) or not losses or not isinstance(validation, dict):
        return None
    last_step = len(losses)
    kept_step = int(result.get("best_step") or 0)
    trained = _thinned([(step, loss) for step, loss in enumerate(losses, 1) if _is_finite(loss)])
    validated = _validation_points(validation, result.get("before"))
    ticks = _ticks([loss for _step, loss in (*trained, *validated)])
    axes = _Axes(last_step, ticks[0], ticks[-1])
    validated_places = axes.places(validated)

    share_of_kept = kept_step / last_step
    mark_from_right = kept_step > last_step / 2
    distance = 1 - share_of_kept if mark_from_right else share_of_kept
    return {
        "wide": WIDE,
        "high": HIGH,
        "label": _label(losses, validated, kept_step),
        "each": _each(last_step),
        "grid": "".join(f"M0 {axes.y(tick):.0f}h{WIDE}" for tick in ticks),
        "kept": f"M{axes.x(kept_step):.0f} 0v{HIGH}",
        "train": _line(axes.places(trained)),
        "held": _line(validated_places),
        "dots": "".join(f"M{x:.0f} {y:.0f}h0" for x, y in validated_places),
        "ticks": [(f"{tick:g}", _percent_from_top(tick, axes)) for tick in ticks],
        "steps": [(step, f"{100 * step / last_step:.1f}") for step in _marked_steps(last_step)],
        "side": "right" if mark_from_right else "left",
        "at": f"{100 * distance:.1f}",
        "best": kept_step,
        "points": validated,
    }


def _validation_points(validation: JsonView, before: object) -> list[tuple[int, float]]:
    """(step, loss) of every validation; that before the training is of step 0."""
    points = [(int(step), float(loss)) for step, loss in validation.items() if _is_finite(loss)]
    points.sort()
    if _is_finite(before):
        points.insert(0, (0, float(before)))
    return points


def _label(losses: Sequence[object], validated: Sequence[tuple[int, float]], kept_step: int) -> str:
    """The curves in words."""
    n_steps = len(losses)
    label = f"Training loss from {number(losses[0])} to {number(losses[-1])} in {n_steps} steps"
    if validated:
        losses_of_validation = [loss for _step, loss in validated]
        first = number(losses_of_validation[0])
        last = number(losses_of_validation[-1])
        label += f"; validation loss from {first} to {last}"
    return f"{label}; kept step {kept_step}"


def _each(last_step: int) -> str:
    """What a point of the curve of training stands for."""
    if last_step <= POINTS:
        return "each step"
    return f"means of {plural(math.ceil(last_step / POINTS), 'step')}"


def _percent_from_top(loss: float, axes: _Axes) -> str:
    """How far below the top a loss lies, in per cent of the height."""
    return f"{100 * (axes.high - loss) / (axes.high - axes.low):.1f}"


def rounding(rows: list[Row]) -> JsonView | None:
    """Bars of the share of each update that the output's dtype lost; None without any."""
    shares = [(row.key, max(0.0, row.rounding)) for row in rows if row.rounding is not None]
    worst, top = max(shares, key=lambda pair: pair[1], default=("", 0.0))
    if len(shares) < 2 or top == 0:
        return None
    wide = WIDE / len(shares)
    bars = [
        f"M{(i + 0.5) * wide:.1f} {HIGH}V{HIGH * (1 - 0.96 * share / top):.0f}"
        for i, (_key, share) in enumerate(shares)
    ]
    return {
        "wide": WIDE,
        "high": HIGH,
        "worst": worst,
        "top": top,
        "label": f"Rounding loss of {plural(len(shares), 'tensor')}: up to {percent(top)}, {worst}",
        # the bars touch neither each other nor the gaps between
        "stroke": f"{wide * 0.7:.1f}",
        "path": "".join(bars),
    }


def spark(spectrum: JsonView) -> str:
    """Singular values of s·b·a as bars from the largest on: an SVG of 22 pixels' height."""
    sigma: Sequence[float] = spectrum["sigma"]
    if not sigma:
        return ""
    if not sigma[0]:
        return "all zero"
    step = 6 if len(sigma) <= 16 else 3
    style = " class=p3" if step == 3 else ""
    heights = [max(1, round(20 * value / sigma[0])) for value in sigma]
    bars = "".join(f"M{i * step + 2} 22V{22 - height}" for i, height in enumerate(heights))
    label = f"σ {number(float(sigma[0]))} to {number(float(sigma[-1]))}"
    return Markup(
        f'<svg{style} role=img aria-label="{label}" width={len(sigma) * step}>'
        f'<path d="{bars}"/></svg>'
    )


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Points as the means of equal spans, at most POINTS of them."""
    if not points:
        return []
    size = math.ceil(len(points) / POINTS)
    means: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        span = points[start : start + size]
        step = sum(step for step, _loss in span) / len(span)
        loss = sum(loss for _step, loss in span) / len(span)
        means.append((step, loss))
    return means


def _line(places: Sequence[tuple[float, float]]) -> str:
    """The path of a line through places; empty for none."""
    if not places:
        return ""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from below the least value to above the largest.

    >>> _ticks([0.31, 0.94])
    [0.2, 0.4, 0.6, 0.8, 1.0]
    """
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    if high - low <= 1e-9 * abs(high):
        low -= (abs(low) or 1) / 10
        high += (abs(high) or 1) / 10
    step = _round_step((high - low) / 4)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _marked_steps(last_step: int) -> list[int]:
    """The steps of a training that are written below the curves."""
    distance = max(1, round(_round_step(last_step / 4)))
    steps = [0, *range(distance, last_step + 1, distance)]
    if all(after - before >= distance / 2 for before, after in pairwise(steps)):
        return steps
    return [0, last_step]


def _round_step(least: float) -> float:
    """The least of 1, 2, 5 and 10 times a power of ten that is not below `least`."""
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= least * (1 - 1e-9))


def _is_finite(value: object) -> TypeGuard[float]:
    return is_number(value) and math.isfinite(value)
