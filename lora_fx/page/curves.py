"""Losses by step, with the kept step marked; and bars of what rounding lost, tensor by tensor.

The lines stretch with the page and their labels do not: the SVG has no text, the labels are HTML
over it at shares of its width and height, in the page's own size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from lora_fx.page.rows import Row
from lora_fx.page.text import Json, esc, number, percent, plural

POINTS = 400
"""Of a drawn line; a longer run is drawn as means of equal spans."""
WIDE, HIGH = 1000, 300
"""Units of the drawing."""


def training(result: Json) -> str:
    """The training curves as HTML; empty where nothing was trained."""
    losses, held = result.get("losses"), result.get("validation")
    if not isinstance(losses, list) or not losses or not isinstance(held, dict):
        return ""
    last, kept = len(losses), int(result.get("best_step") or 0)
    train = _thinned([(i + 1, x) for i, x in enumerate(losses) if _finite(x)])
    points = sorted((int(k), v) for k, v in held.items() if _finite(v))
    if _finite(before := result.get("before")):
        points.insert(0, (0, before))
    ticks = _ticks([y for _, y in (*train, *points)])
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return WIDE * step / max(1, last)

    def y(loss: float) -> float:
        return HIGH * (high - loss) / (high - low)

    grid = "".join(f"M0 {y(t):.0f}h{WIDE}" for t in ticks)
    body = [f'<path class=grid d="{grid}"/>']
    body.append(f'<path class=kept d="M{x(kept):.0f} 0v{HIGH}"/>')
    body.append(f'<path class="line train" d="{_line([(x(a), y(b)) for a, b in train])}"/>')
    if points:
        places = [(x(a), y(b)) for a, b in points]
        dots = "".join(f"M{a:.0f} {b:.0f}h0" for a, b in places)
        body.append(f'<path class="line held" d="{_line(places)}"/><path class=dots d="{dots}"/>')
    label = _words(losses, points, kept, last)
    side = "right" if kept > last / 2 else "left"
    at = 100 * (1 - kept / max(1, last)) if side == "right" else 100 * kept / max(1, last)
    left = "".join(
        f"<span style=top:{100 * (high - t) / (high - low):.1f}%>{t:g}</span>" for t in ticks
    )
    steps = _steps(last)
    below = "".join(f"<span style=left:{100 * s / last:.1f}%>{number(s)}</span>" for s in steps)
    key = (
        "<i class=train></i> training, each step"
        if len(losses) <= POINTS
        else (f"<i class=train></i> training, means of {plural(math.ceil(last / POINTS), 'step')}")
    )
    key += " <i class=held></i> validation" if points else ""
    return (
        f"<figure class=curve><figcaption>Loss by step. <span class=legend>{key}</span>"
        f"</figcaption><div class=plot><div class=left aria-hidden=true>{left}</div>"
        f'<svg role=img aria-label="{esc(label)}" viewBox="0 0 {WIDE} {HIGH}" '
        f"preserveAspectRatio=none>{''.join(body)}</svg>"
        f"<span class=mark style={side}:{at:.1f}%>kept: step {number(kept)}</span>"
        f"<div class=below aria-hidden=true>{below}</div></div></figure>"
        + _validations(points, kept)
    )


def rounding(rows: list[Row]) -> str:
    """Bars of the share of each update that the output's dtype lost; empty without any."""
    lost = [(r.key, max(0.0, r.rounding)) for r in rows if r.rounding is not None]
    top = max((x for _, x in lost), default=0.0)
    if len(lost) < 2 or top == 0:
        return ""
    wide = WIDE / len(lost)
    path = "".join(
        f"M{(i + 0.5) * wide:.1f} {HIGH}V{HIGH * (1 - 0.96 * x / top):.0f}"
        for i, (_, x) in enumerate(lost)
    )
    worst = max(lost, key=lambda pair: pair[1])
    label = f"Rounding loss of {plural(len(lost), 'tensor')}: up to {percent(top)}, {worst[0]}"
    # ‰ of the drawing's width, so that bars touch neither each other nor the gaps between
    return (
        "<figure class=curve><figcaption>Share of each update that rounding lost, in the order of "
        f"the table. Worst: <code>{esc(worst[0])}</code>, {percent(top)}.</figcaption>"
        f'<svg class=bars role=img aria-label="{esc(label)}" viewBox="0 0 {WIDE} {HIGH}" '
        f'preserveAspectRatio=none><path stroke-width={wide * 0.7:.1f} d="{path}"/></svg></figure>'
    )


def spark(spectrum: Json) -> str:
    """Singular values of s·b·a as bars from the largest on: an SVG of 22 pixels' height."""
    sigma: Sequence[float] = spectrum["sigma"]
    if not sigma or not sigma[0]:
        return "all zero" if sigma else ""
    step = 6 if len(sigma) <= 16 else 3
    bars = "".join(
        f"M{i * step + 2} 22V{22 - max(1, round(20 * s / sigma[0]))}" for i, s in enumerate(sigma)
    )
    label = f"σ {number(float(sigma[0]))} to {number(float(sigma[-1]))}"
    return (
        f'<svg{" class=p3" * (step == 3)} role=img aria-label="{label}" width={len(sigma) * step}>'
        f'<path d="{bars}"/></svg>'
    )


def _words(
    losses: Sequence[float], points: Sequence[tuple[int, float]], kept: int, last: int
) -> str:
    text = f"Training loss from {number(losses[0])} to {number(losses[-1])} in {last} steps"
    if points:
        text += f"; validation loss from {number(points[0][1])} to {number(points[-1][1])}"
    return f"{text}; kept step {kept}"


def _validations(points: Sequence[tuple[int, float]], kept: int) -> str:
    """The validations in numbers: what the curve shows, for who does not see it."""
    if not points:
        return ""
    items = []
    for step, loss in points:
        what = "before" if step == 0 else f"step {number(step)}"
        value = number(float(loss))
        items.append(
            f"<li><b>{what} (kept) {value}</b>"
            if step == kept
            else f"<li><span>{what}</span> {value}"
        )
    return f"<h3>Validation loss</h3><ul class=steps>{''.join(items)}</ul>"


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


def _finite(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
