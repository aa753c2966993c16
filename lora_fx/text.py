"""Text for people: tables, counts, hints, numbers; also free names and lists by key."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from lora_fx.errors import LoraFxError, visible
from lora_fx.errors import near as near

K = TypeVar("K")
T = TypeVar("T")
Json = dict[str, Any]
"""A JSON object, with values of JSON types."""
JsonView = Mapping[str, Any]
"""A JSON object that is not changed."""
StrPath = str | os.PathLike[str]
"""The type of a path that a user gives."""


def strict_json(value: Any) -> Any:
    """Return a value that any JSON reader accepts: null for inf and NaN, no lone surrogates."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {strict_json(str(key)): strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


def listed_texts(text: str) -> list[str]:
    """Return the texts of a list in Python's `repr`, from another program; empty for other text.

    >>> listed_texts("['h.0', 'h.0.fc']"), listed_texts("{[]}"), listed_texts("5")
    (['h.0', 'h.0.fc'], [], [])
    """
    try:
        value = ast.literal_eval(text[:_LONGEST_LIST])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return []
    return value


_LONGEST_LIST = 100_000
"""The longest list text that is read; a hundred modules around a node have some thousands."""


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Format rows as aligned text columns, with the first row underlined."""
    rows = [tuple(map(visible, row)) for row in rows]
    n_columns = len(rows[0])
    widths = [max(len(row[column]) for row in rows) for column in range(n_columns)]
    head, *lines = (_aligned(row, widths) for row in rows)
    underline = "  ".join("-" * width for width in widths)
    return [head, underline, *lines]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Format cells as one line, each as wide as its column."""
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join(padded).rstrip()


def html(text: str, rows: Sequence[Sequence[str]] = ()) -> str:
    """Format a line of text and a table (first row as head) as HTML for notebooks, all escaped."""
    from html import escape

    def line(row: Sequence[str], tag: str) -> str:
        cells = [f"<{tag}>{escape(visible(cell))}</{tag}>" for cell in row]
        return f"<tr>{''.join(cells)}</tr>"

    head = "".join(line(row, "th") for row in rows[:1])
    body = "".join(line(row, "td") for row in rows[1:])
    return f"<p>{escape(visible(text))}</p><table>{head}{body}</table>"


def short(instance: Any) -> str:
    """Return a dataclass's repr in one line, with arrays as shapes and collections as lengths.

    >>> @dataclasses.dataclass
    ... class Pair:
    ...     names: tuple[str, ...]
    ...     weight: float = 1.0
    >>> short(Pair(("a", "b"))), short(Pair((), 0.5))
    ('Pair(names=2)', 'Pair(names=(), weight=0.5)')
    """
    texts: list[str] = []
    for field in dataclasses.fields(instance):
        if not field.repr:
            continue
        value = getattr(instance, field.name)
        if not _is_default(field, value):
            texts.append(f"{field.name}={_brief(value)}")
    return f"{type(instance).__name__}({', '.join(texts)})"


def _is_default(field: dataclasses.Field[Any], value: object) -> bool:
    """Whether the value is the field's default."""
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return value is field.default


def _brief(value: object) -> str:
    """Return a short text for a value."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Collection) and not isinstance(value, str):
        is_short_tuple = isinstance(value, tuple) and len(value) < 5
        if is_short_tuple and all(map(is_number, value)):
            return repr(value)
        return str(len(value))
    return repr(value)


def human(count: float) -> str:
    """Return a count with an SI prefix.

    >>> human(950), human(12_300_000)
    ('950', '12.3 M')
    """
    if count < 1000:
        return f"{count:.0f}"
    power = min(5, int(math.log10(count) // 3))
    return f"{count / 1000**power:.1f} {' kMGTP'[power]}"


def size_in_bytes(text: str) -> int:
    """Parse a count of bytes as people write it.

    Raises:
        LoraFxError: The text is not a size.

    >>> size_in_bytes("5GB"), size_in_bytes("1.5 MiB"), size_in_bytes("1000")
    (5000000000, 1572864, 1000)
    """
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if match is None:
        raise LoraFxError(
            f"{text!r} is not a size; expected a number of bytes", "pass 5GB or 500MB, for example"
        )
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    power = " KMGT".index(unit or " ")
    return int(float(number) * base**power)


def sized(count: int) -> str:
    """Return a number of bytes as text.

    >>> sized(999), sized(12_345_678), sized(999_999)
    ('999 B', '12.3 MB', '1 MB')
    """
    value = float(count)
    if value < 999.5:
        return f"{value:.0f} B"
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.3g} TB"


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is an int or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether the value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def plain_number(number: float) -> float:
    """Return a number as people and PEFT write it: an int if it is whole."""
    if float(number).is_integer():
        return int(number)
    return float(number)


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first of many names, and how many more there are.

    >>> some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    text = ", ".join(map(visible, names[:most]))
    n_further = len(names) - most
    if n_further > 0:
        text += f" and {n_further} more"
    return text


def counted(count: int, word: str, shown: str = "") -> str:
    """Return a count and its word, with an s unless the count is one.

    Args:
        count: How many.
        word: The word for one of them.
        shown: The count as a text, where it is not its plain digits.

    >>> counted(1, "update"), counted(2, "update")
    ('1 update', '2 updates')
    """
    plural = "" if count == 1 else "s"
    return f"{shown or count} {word}{plural}"


def free_name(stem: str, taken: Container[str], joint: str = ".") -> str:
    """Return the stem if it is not taken, else the first free of STEM.1, STEM.2 ….

    >>> free_name("w", ()), free_name("w", ("w", "w.1"))
    ('w', 'w.2')
    """
    numbered = (f"{stem}{joint}{i}" for i in itertools.count(1))
    return next(name for name in itertools.chain([stem], numbered) if name not in taken)


def by_key(pairs: Iterable[tuple[K, T]]) -> dict[K, list[T]]:
    """Return the values of every key, in the order of the pairs.

    >>> by_key([("a", 1), ("b", 2), ("a", 3)])
    {'a': [1, 3], 'b': [2]}
    """
    values_of: dict[K, list[T]] = {}
    for key, value in pairs:
        values_of.setdefault(key, []).append(value)
    return values_of
