"""The comparisons of a result for its table: those with equal numbers are one row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lora_fx.text import JsonView, by_key


def parity_rows(parity: Sequence[JsonView]) -> list[dict[str, Any]]:
    """Return a row for each comparison, in order; `sizes` becomes a list of all that are equal.

    Comparisons are equal if only their sizes differ: a fold without any rounding is one row.

    >>> same = {"of": "fold", "output": "y", "rel": 0.0}
    >>> parity_rows([{**same, "sizes": {"x": [2]}}, {**same, "sizes": {"x": [3]}}])
    [{'of': 'fold', 'output': 'y', 'rel': 0.0, 'sizes': [{'x': [2]}, {'x': [3]}]}]
    """
    alike = by_key((json.dumps(_without_sizes(row), default=str), row) for row in parity)
    return [
        {**_without_sizes(rows[0]), "sizes": [row["sizes"] for row in rows]}
        for rows in alike.values()
    ]


def _without_sizes(row: JsonView) -> dict[str, Any]:
    return {field: value for field, value in row.items() if field != "sizes"}
