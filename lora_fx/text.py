"""Text for people: tables, counts, and hints with the nearest names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as aligned text columns, the first row underlined."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]


def human(n: float) -> str:
    """A count with an SI prefix.

    >>> human(950), human(12_300_000)
    ('950', '12.3 M')
    """
    if n < 1000:
        return f"{n:.0f}"
    power = min(5, int(math.log10(n) // 3))
    return f"{n / 1000**power:.1f} {' kMGTP'[power]}"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def near(name: str, names: Mapping[str, Any] | list[str]) -> str:
    """A hint with the closest known names."""
    import difflib

    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.4)
    return (
        f"nearest names: {', '.join(close)}" if close else "run lora-fx targets MODEL for the names"
    )


def near_names(text: str, names: Sequence[str]) -> str:
    """A hint with the nearest names."""
    import difflib

    words = {n.removesuffix(".weight") for n in names}
    words |= {n.rpartition(".")[2] for n in words}
    close = difflib.get_close_matches(text, sorted(words), n=3, cutoff=0.3)
    return f"nearest names: {', '.join(close)}" if close else "run lora-fx targets MODEL"
