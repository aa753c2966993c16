"""JSON files, read strictly: what two readers could take for two things is refused."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.read import AGAIN, read_bytes
from lora_fx.text import Json

MAX_JSON = 32 << 20
"""Largest JSON file, header or index, in bytes; Python's json takes about 12 times that."""


def json_value(
    raw: str | bytes, where: str, *, sizes: bool = False, constants: bool = False, hint: str = AGAIN
) -> Any:
    """A JSON value, read strictly: no key twice, no NaN, no half of a surrogate pair.

    A whole number of more than 64 bits is a float, as in other languages: nothing that is counted
    is as large, and no array holds it. One of more than 300 digits is refused, since Python's time
    for thousands of them is long. A fraction that no float holds, such as 1e999, is refused too.

    Args:
        raw: UTF-8 where it is bytes.
        where: The file, for messages.
        sizes: -0 is refused too, and a mark of byte order: whole numbers are sizes.
        constants: Infinity and NaN are taken, which Python writes and JSON has not.
        hint: The hint of the error.

    Raises:
        LoraFxError: It is no JSON, or nested too deeply.
    """
    try:
        encoding = "utf-8" if sizes else "utf-8-sig"
        text = raw.decode(encoding) if isinstance(raw, bytes) else raw
        value = _parsed(text, sizes, constants)
        if "\\u" in text:  # half a surrogate pair is no text: nothing could print or write it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        why = one_line(error)
        if isinstance(error, RecursionError):
            why = "too deeply nested"
        raise LoraFxError(f"{where}: not valid JSON: {why}", hint) from error
    return value


def _parsed(text: str, sizes: bool, constants: bool) -> Any:
    """The value of a text, by json.loads and the checks of `json_value`.

    Python's own reading of numbers is faster, and right where no number is long.

    Raises:
        ValueError: It is no JSON, or JSON that is refused.
    """
    parse_int: Callable[[str], object] | None = None
    parse_float: Callable[[str], object] | None = None
    parse_constant: Callable[[str], object] | None = None
    has_long_number = re.search(r"\d{19}|[eE]\+?\d{3}", text) is not None
    if sizes and "-0" in text:
        parse_int = _size
    elif has_long_number:
        parse_int = _integer
    if has_long_number and not constants:
        parse_float = _fraction
    if not constants:
        parse_constant = _refuse_constant
    return json.loads(
        text,
        object_pairs_hook=_object_without_repeated_keys,
        parse_constant=parse_constant,
        parse_int=parse_int,
        parse_float=parse_float,
    )


def _object_without_repeated_keys(pairs: list[tuple[str, object]]) -> Json:
    """A JSON object of its keys and values."""
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    counts = Counter(key for key, _ in pairs)
    repeated = next(key for key, count in counts.items() if count > 1)
    raise ValueError(f"key {one_line(repr(repeated), 80)} appears twice")


def _refuse_constant(name: str) -> None:
    """Raise for NaN, Infinity and -Infinity."""
    raise ValueError(f"{name} is not JSON")


def _size(digits: str) -> int | float:
    """A whole number that may be a size."""
    if digits == "-0":
        raise ValueError("-0 is not a size")
    return _integer(digits)


def _integer(digits: str) -> int | float:
    """A whole number; a float where it has more than 64 bits."""
    if len(digits) > 300:
        raise ValueError(f"a whole number of {len(digits)} digits")
    number = int(digits)
    if abs(number) < 1 << 64:
        return number
    return float(number)


def _fraction(digits: str) -> float:
    """A number with a fraction or an exponent."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{one_line(digits, 40)} is larger than a float holds")
    return value


def json_object(
    raw: str | bytes, where: str, *, sizes: bool = False, constants: bool = False, hint: str = AGAIN
) -> Json:
    """A JSON object; see json_value.

    Raises:
        LoraFxError: The text is not JSON, or not an object.
    """
    value = json_value(raw, where, sizes=sizes, constants=constants, hint=hint)
    if not isinstance(value, dict):
        raise LoraFxError(f"{where}: a JSON {type(value).__name__}, not an object", hint)
    return value


def read_json(path: str | os.PathLike[str], *, constants: bool = False, hint: str = AGAIN) -> Json:
    """The JSON object of a file of at most MAX_JSON bytes; see json_object."""
    text = read_bytes(path, most=MAX_JSON)
    return json_object(text, os.fspath(path), constants=constants, hint=hint)
