"""Text for HTML: escaping and number formats. No name is trusted.

Keys and paths come from files. A character that is not seen, or that turns the text round it
(U+202E), is shown by its code; the rest is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from markupsafe import Markup

from lora_fx.errors import visible
from lora_fx.text import counted, is_number, sized

THIN = "\u202f"
"""A narrow non-breaking space between groups of three digits."""


def broken(key: str) -> Markup:
    """Return a key as HTML in which a line may break after dots, about every dozen characters.

    >>> broken("model.layers.0.self_attn.q_proj.weight")
    Markup('model.layers.<wbr>0.self_attn.<wbr>q_proj.weight')
    """
    pieces = re.findall(r".{10,}?\.(?=.{6})|.+", key, re.S)
    return Markup("<wbr>").join(map(visible, pieces))


def broken_path(path: str) -> Markup:
    """Return a path as HTML in which a line may break after its slashes, dots and dashes.

    >>> broken_path("ad/adapter_model.safetensors")
    Markup('ad/<wbr>adapter_<wbr>model.<wbr>safetensors')
    """
    return Markup("<wbr>").join(map(visible, re.findall(r".+?[/._-]+(?=.)|.+", path, re.S)))


def broken_hash(digest: str) -> Markup:
    """Return a hash as HTML in which a line may break after every eighth digit.

    >>> broken_hash("0123456789abcdef")
    Markup('01234567<wbr>89abcdef')
    """
    return Markup("<wbr>").join(visible(digest[at : at + 8]) for at in range(0, len(digest), 8))


def duration(seconds: object) -> str:
    r"""Return seconds as text, from two minutes on in minutes and from two hours on in hours.

    >>> duration(3.5), duration(602.1), duration(9000)
    ('3.5\xa0s', '10\xa0min\xa02\xa0s', '2\xa0h\xa030\xa0min')
    """
    if not is_number(seconds) or not math.isfinite(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes}\u00a0min\u00a0{rest}\u00a0s"
    return f"{minutes // 60}\u00a0h\u00a0{minutes % 60}\u00a0min"


def number(value: object) -> str:
    r"""Return a number in at most four digits; whole numbers in full, a dash for no number.

    >>> number(1.23456e-7), number(0.123456), number(12345678), number(None), number(1234.56)
    ('1.23e-07', '0.1235', '12\u202f345\u202f678', '–', '1235')
    """
    if not is_number(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}".replace(",", THIN)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if value < 0:
        return "−" + number(-value)
    if value < 1e-2 or value >= 1e5:
        return f"{value:.2e}"
    return f"{value:#.4g}".rstrip(".")


def percent(value: object) -> str:
    r"""Return a share in per cent, three digits; a tiny one as a power of ten, None as a dash.

    >>> percent(0.0123456), percent(1.0), percent(2e-7), percent(0.99999), percent(None)
    ('1.23\xa0%', '100\xa0%', '2.0e-05\xa0%', '99.99\xa0%', '–')
    >>> percent(-3.21e-5), percent(0)
    ('−0.0032\xa0%', '0\xa0%')
    """
    if not is_number(value) or not math.isfinite(value):
        return "–"
    if value < 0:
        return "−" + percent(-value)
    return f"{_points(100 * value)}\u00a0%"


def _points(points: float) -> str:
    """Return percentage points in three digits; less than 100 is never shown as 100."""
    if points == 0:
        return "0"
    if points < 1e-4:
        return f"{points:.1e}"
    if points < 0.01:
        return f"{points:#.2g}"
    if 99 < points < 100:
        return f"{min(points, 99.99):.2f}"
    if points < 999.5:
        return f"{points:#.3g}".rstrip(".")
    return f"{points:.0f}"


def size(count: object) -> str:
    r"""Return bytes as text.

    >>> size(999), size(12_345_678), size(999_999)
    ('999\xa0B', '12.3\xa0MB', '1\xa0MB')
    """
    if not isinstance(count, int):
        return "–"
    return sized(count).replace(" ", "\u00a0")


def shape(dims: Sequence[object]) -> str:
    """Return a shape with multiplication signs.

    >>> shape([768, 3072])
    '768 × 3072'
    """
    if not dims:
        return "scalar"
    return " × ".join(map(str, dims))


def plural(count: int, word: str) -> str:
    """Return a count and its word.

    >>> plural(1, "target"), plural(2, "target")
    ('1 target', '2 targets')
    """
    return counted(count, word, number(count))
