"""Losses by step, with the kept step marked; bars of what rounding lost; spectra of updates.

What is worked out here is drawn by templates/charts.html.j2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeGuard

from markupsafe import Markup

from lora_fx.report.formatting import number, percent, plural
from lora_fx.report.rows import Row
from lora_fx.text import JsonView, is_number

POINTS = 400
"""The most points of a drawn line; a longer run is drawn as means of equal spans."""
WIDE, HIGH = 1000, 300
"""Units of the drawing."""


def training(result: JsonView) -> JsonView | None:
    """The training curves; None where nothing was trained."""
    losses, held = result.get("losses"), result.get("validation")
    if not isinstance(losses, list) or not losses or not isinstance(held, dict):
        return None
    last, kept = len(losses), int(result.get("best_step") or 0)
    train = _thinned([(i + 1, x) for i, x in enumerate(losses) if _finite(x)])
    points = sorted((int(k), float(v)) for k, v in held.items() if _finite(v))
    if _finite(before := result.get("before")):
        points.insert(0, (0, float(before)))
    ticks = _ticks([y for _, y in (*train, *points)])
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return WIDE * step / max(1, last)

    def y(loss: float) -> float:
        return HIGH * (high - loss) / (high - low)

    places = [(x(a), y(b)) for a, b in points]
    label = f"Training loss from {number(losses[0])} to {number(losses[-1])} in {last} steps"
    if points:
        label += f"; validation loss from {number(points[0][1])} to {number(points[-1][1])}"
    right = kept > last / 2
    spans = plural(math.ceil(last / POINTS), "step")
    return {
        "wide": WIDE,
        "high": HIGH,
        "label": f"{label}; kept step {kept}",
        "each": "each step" if last <= POINTS else f"means of {spans}",
        "grid": "".join(f"M0 {y(t):.0f}h{WIDE}" for t in ticks),
        "kept": f"M{x(kept):.0f} 0v{HIGH}",
        "train": _line([(x(a), y(b)) for a, b in train]),
        "held": _line(places),
        "dots": "".join(f"M{a:.0f} {b:.0f}h0" for a, b in places),
        "ticks": [(f"{t:g}", f"{100 * (high - t) / (high - low):.1f}") for t in ticks],
        "steps": [(s, f"{100 * s / last:.1f}") for s in _steps(last)],
        "side": "right" if right else "left",
        "at": f"{100 * (1 - kept / last if right else kept / last):.1f}",
        "best": kept,
        "points": points,
    }


def rounding(rows: list[Row]) -> JsonView | None:
    """Bars of the share of each update that the output's dtype lost; None without any."""
    lost = [(r.key, max(0.0, r.rounding)) for r in rows if r.rounding is not None]
    worst, top = max(lost, key=lambda pair: pair[1], default=("", 0.0))
    if len(lost) < 2 or top == 0:
        return None
    wide = WIDE / len(lost)
    return {
        "wide": WIDE,
        "high": HIGH,
        "worst": worst,
        "top": top,
        "label": f"Rounding loss of {plural(len(lost), 'tensor')}: up to {percent(top)}, {worst}",
        # the bars touch neither each other nor the gaps between
        "stroke": f"{wide * 0.7:.1f}",
        "path": "".join(
            f"M{(i + 0.5) * wide:.1f} {HIGH}V{HIGH * (1 - 0.96 * x / top):.0f}"
            for i, (_, x) in enumerate(lost)
        ),
    }


def spark(spectrum: JsonView) -> str:
    """Singular values of s·b·a as bars from the largest on: an SVG of 22 pixels' height."""
    sigma: Sequence[float] = spectrum["sigma"]
    if not sigma or not sigma[0]:
        return "all zero" if sigma else ""
    step = 6 if len(sigma) <= 16 else 3
    bars = "".join(
        f"M{i * step + 2} 22V{22 - max(1, round(20 * s / sigma[0]))}" for i, s in enumerate(sigma)
    )
    label = f"σ {number(float(sigma[0]))} to {number(float(sigma[-1]))}"
    return Markup(
        f'<svg{" class=p3" * (step == 3)} role=img aria-label="{label}" width={len(sigma) * step}>'
        f'<path d="{bars}"/></svg>'
    )


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / POINTS)
    spans = [points[i : i + size] for i in range(0, len(points), size)] if size else []
    return [
        (sum(s for s, _ in span) / len(span), sum(v for _, v in span) / len(span)) for span in spans
    ]


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points) if points else ""


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from below the least value to above the largest.

    >>> _ticks([0.31, 0.94])
    [0.2, 0.4, 0.6, 0.8, 1.0]
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= 1e-9 * abs(high):
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    step = _step((high - low) / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _steps(last: int) -> list[int]:
    step = max(1, round(_step(last / 4)))
    marks = [0, *range(step, last + 1, step)]
    return marks if all(b - a >= step / 2 for a, b in pairwise(marks)) else [0, last]


def _step(rough: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= rough * (1 - 1e-9))


def _finite(x: object) -> TypeGuard[float]:
    return is_number(x) and math.isfinite(x)
