"""JSON files, read strictly: what two readers could take for two things is refused."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
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
    is as large, and no array holds it. More than 300 digits are refused: some of thousands take
    Python's time. A fraction that no float holds, such as 1e999, is infinite, and refused as such.

    Args:
        raw: UTF-8 where it is bytes.
        where: The file, for messages.
        sizes: -0 is refused too, and a mark of byte order: whole numbers are sizes.
        constants: Infinity and NaN are taken, which Python writes and JSON has not.
        hint: Of the error.

    Raises:
        LoraFxError: It is no JSON, or nested too deeply.
    """

    def once(pairs: list[tuple[str, object]]) -> Json:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
            raise ValueError(f"key {one_line(repr(twice), 80)} is there twice")
        return result

    def number(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def integer(digits: str) -> int | float:
        if sizes and digits == "-0":
            raise ValueError("-0 is no size")
        if len(digits) > 300:
            raise ValueError(f"a whole number of {len(digits)} digits")
        whole = int(digits)
        return whole if abs(whole) < 1 << 64 else float(whole)

    def fraction(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ValueError(f"{one_line(digits, 40)} is larger than a float holds")
        return value

    try:
        encoding = "utf-8" if sizes else "utf-8-sig"
        plain = raw.decode(encoding) if isinstance(raw, bytes) else raw
        # Python's own way is faster, and right where no number is long.
        long = re.search(r"\d{19}|[eE]\+?\d{3}", plain)
        odd = (sizes and "-0" in plain) or long
        value = json.loads(
            plain,
            object_pairs_hook=once,
            parse_constant=None if constants else number,
            parse_int=integer if odd else None,
            parse_float=fraction if long and not constants else None,
        )
        if "\\u" in plain:  # half a surrogate pair is no text: nothing could print or write it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        why = "too deeply nested" if isinstance(error, RecursionError) else one_line(error)
        raise LoraFxError(f"{where}: not valid JSON: {why}", hint) from error
    return value


def json_object(
    raw: str | bytes, where: str, *, sizes: bool = False, constants: bool = False, hint: str = AGAIN
) -> Json:
    """A JSON object; see json_value.

    Raises:
        LoraFxError: It is no JSON, or no object.
    """
    value = json_value(raw, where, sizes=sizes, constants=constants, hint=hint)
    if not isinstance(value, dict):
        raise LoraFxError(f"{where}: a JSON {type(value).__name__}, not an object", hint)
    return value


def read_json(path: str | os.PathLike[str], *, constants: bool = False, hint: str = AGAIN) -> Json:
    """The JSON object of a file of at most MAX_JSON bytes; see json_object."""
    text = read_bytes(path, most=MAX_JSON)
    return json_object(text, os.fspath(path), constants=constants, hint=hint)
