"""Charts: training losses with the kept step marked, rounding losses, and spectra.

What is worked out here is drawn by templates/charts.html.j2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from typing import TypeGuard

from markupsafe import Markup

from lora_fx.report.html_text import number, percent, plural
from lora_fx.report.loss_axis import LossAxis, round_step
from lora_fx.report.rows import Row
from lora_fx.text import JsonView, is_number

POINTS = 400
"""The most points of a drawn line; a longer run is averaged over equal spans."""
WIDE = 1000
HIGH = 300
"""The height of a drawing, in its own units."""
LOGARITHMIC = ", on a logarithmic axis"


def training(result: JsonView) -> JsonView | None:
    """Return the training curves; None if nothing was trained."""
    losses = result.get("losses")
    validation = result.get("validation")
    if not isinstance(losses, list) or not losses or not isinstance(validation, dict):
        return None
    last = len(losses)
    best = int(result.get("best_step") or 0)
    has_ended = not (result.get("page") or {}).get("run")
    kept_word = "kept" if has_ended else "best"
    curve = _thinned([(step, loss) for step, loss in enumerate(losses, 1) if _finite(loss)])
    points = _validation_points(validation, result.get("before"))
    axis = LossAxis.of([loss for _, loss in (*curve, *points)])

    def x(step: float) -> float:
        return WIDE * step / max(1, last)

    def y(loss: float) -> float:
        return HIGH * axis.depth(loss)

    places = [(x(step), y(loss)) for step, loss in points]
    each = "each step"
    if last > POINTS:
        each = f"means of {plural(math.ceil(last / POINTS), 'step')}"
    # the label of the kept step is placed from the nearer side
    side = "left"
    distance = best / last
    if best > last / 2:
        side = "right"
        distance = 1 - best / last
    return {
        "wide": WIDE,
        "high": HIGH,
        "label": f"{_training_label(losses, points)}; {kept_word}: step {best}",
        "each": each,
        "axis": LOGARITHMIC if axis.is_logarithmic else "",
        "grid": "".join(f"M0 {y(tick):.0f}h{WIDE}" for tick in axis.ticks),
        "kept": f"M{x(best):.0f} 0v{HIGH}",
        "train": _line([(x(step), y(loss)) for step, loss in curve]),
        "held": _line(places),
        "dots": "".join(f"M{left:.0f} {top:.0f}h0" for left, top in places),
        "ticks": axis.labels(),
        "steps": [(step, f"{100 * step / last:.1f}") for step in _steps(last)],
        "side": side,
        "at": f"{100 * distance:.1f}",
        "best": best,
        "kept_word": kept_word,
        "points": points,
    }


def runs(result: JsonView) -> JsonView | None:
    """Return the curves of the runs of a sweep; None without runs."""
    rows = result.get("runs")
    if not isinstance(rows, list) or not rows:
        return None
    last = max(len(row["losses"]) for row in rows)
    trained = [
        _thinned([(step, loss) for step, loss in enumerate(row["losses"], 1) if _finite(loss)])
        for row in rows
    ]
    validated = [_validation_points(row["validation"], row["before"]) for row in rows]
    losses = [loss for curve in trained for _, loss in curve]
    losses += [loss for curve in validated for _, loss in curve]
    axis = LossAxis.of(losses)

    def line(curve: Sequence[tuple[float, float]]) -> str:
        spots = [(WIDE * step / max(1, last), HIGH * axis.depth(loss)) for step, loss in curve]
        return _line(spots)

    best = result.get("best")
    others = [place for place, row in enumerate(rows) if row["run"] != best]
    of_best = [place for place, row in enumerate(rows) if row["run"] == best]
    return {
        "wide": WIDE,
        "high": HIGH,
        "label": f"Training and validation losses of {plural(len(rows), 'run')}; best: run {best}",
        "axis": LOGARITHMIC if axis.is_logarithmic else "",
        "grid": "".join(f"M0 {HIGH * axis.depth(tick):.0f}h{WIDE}" for tick in axis.ticks),
        "ticks": axis.labels(),
        "steps": [(step, f"{100 * step / last:.1f}") for step in _steps(last)],
        "train": "".join(line(trained[place]) for place in others),
        "held": "".join(line(validated[place]) for place in others),
        "best_train": "".join(line(trained[place]) for place in of_best),
        "best_held": "".join(line(validated[place]) for place in of_best),
        "best": best,
        "names": list(rows[0]["options"]),
        "rows": rows,
    }


def _validation_points(validation: JsonView, before: object) -> list[tuple[int, float]]:
    """Return (step, validation loss) in order; step 0 is before the training."""
    points = []
    for step, loss in validation.items():
        if _finite(loss):
            points.append((int(step), float(loss)))
    points.sort()
    if _finite(before):
        points.insert(0, (0, float(before)))
    return points


def _training_label(losses: Sequence[object], points: Sequence[tuple[int, float]]) -> str:
    """Return a text description of the curves."""
    first = number(losses[0])
    label = f"Training loss from {first} to {number(losses[-1])} in {len(losses)} steps"
    if points:
        label += f"; validation loss from {number(points[0][1])} to {number(points[-1][1])}"
    return label


def rounding(rows: list[Row]) -> JsonView | None:
    """Return bars of each update's share that the output's dtype lost; None without any."""
    losses = []
    for row in rows:
        if row.rounding is not None:
            losses.append((row.key, max(0.0, row.rounding)))
    worst, top = max(losses, key=itemgetter(1), default=("", 0.0))
    if len(losses) < 2 or top == 0:
        return None
    width = WIDE / len(losses)
    bars = []
    for position, (_, loss) in enumerate(losses):
        bars.append(f"M{(position + 0.5) * width:.1f} {HIGH}V{HIGH * (1 - 0.96 * loss / top):.0f}")
    tensors = plural(len(losses), "tensor")
    return {
        "wide": WIDE,
        "high": HIGH,
        "worst": worst,
        "top": top,
        "label": f"Rounding loss of {tensors}: up to {percent(top)}, {worst}",
        # the bars touch neither each other nor the gaps between
        "stroke": f"{width * 0.7:.1f}",
        "path": "".join(bars),
    }


def spark(spectrum: JsonView) -> str:
    """Return singular values of s·b·a as bars, largest first: an SVG of 22 pixels' height."""
    sigma: Sequence[float] = spectrum["sigma"]
    if not sigma:
        return ""
    if not sigma[0]:
        return "all zero"
    step = 6
    style = ""
    if len(sigma) > 16:
        step = 3
        style = " class=p3"
    bars = []
    for position, value in enumerate(sigma):
        height = max(1, round(20 * value / sigma[0]))
        bars.append(f"M{position * step + 2} 22V{22 - height}")
    label = f"σ {number(float(sigma[0]))} to {number(float(sigma[-1]))}"
    return Markup(
        f'<svg{style} role=img aria-label="{label}" width={len(sigma) * step}>'
        f'<path d="{"".join(bars)}"/></svg>'
    )


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return the points averaged over equal spans, at most POINTS."""
    size = math.ceil(len(points) / POINTS)
    means = []
    for start in range(0, len(points), max(1, size)):
        span = points[start : start + size]
        step = sum(step for step, _ in span) / len(span)
        loss = sum(loss for _, loss in span) / len(span)
        means.append((step, loss))
    return means


def _line(points: Sequence[tuple[float, float]]) -> str:
    """Return the SVG path of a line through points; empty without any."""
    if not points:
        return ""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _steps(last: int) -> list[int]:
    """Return steps to mark between 0 and the last; only these two if marks would be too close."""
    step = max(1, round(round_step(last / 4)))
    marks = [0, *range(step, last + 1, step)]
    if all(following - mark >= step / 2 for mark, following in pairwise(marks)):
        return marks
    return [0, last]


def _finite(value: object) -> TypeGuard[float]:
    return is_number(value) and math.isfinite(value)
