"""Reading of TOML with limits, because tomllib is slow, and not linear in dotted keys."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator

from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.read import read_text
from lora_fx.text import Json

MAX_TOML = 1 << 19
"""The size in bytes of the largest TOML file (5,000 adapter paths); tomllib takes a second."""
MAX_DOTS = 16
"""The most parts of a dotted key; for a key of 20,000 parts tomllib takes 18 s and 2 GB."""
_QUOTED = re.compile(
    r"""(?sx) \"{3} (?: \\. | (?!\"{3}). )*+ (?: \"{3} | \Z)
    | '{3} (?: (?!'{3}). )*+ (?: '{3} | \Z)
    | " (?: \\. | [^"\\\n] )*+ "?
    | ' [^'\n]*+ '?
    | \# [^\n]*+"""
)
"""The pattern of a quoted text, whose end may be missing, or of a comment."""
_LONG_KEY = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{MAX_DOTS}}}[\w-]")
"""The pattern of a dotted key of more than MAX_DOTS parts, without quoted parts."""


def read_toml(path: str | os.PathLike[str], hint: str) -> Json:
    """Read the tables of a TOML file of at most MAX_TOML bytes.

    Args:
        path: The file.
        hint: The hint of the error, where it is no TOML.

    Raises:
        LoraFxError: It is no TOML, nested too deeply, or holds a whole number of more than the 64
            bits that TOML has.
    """
    name = os.fspath(path)
    text = read_text(path, most=MAX_TOML)
    if _LONG_KEY.search(_QUOTED.sub("q", text)):
        raise LoraFxError(f"{name}: a dotted key of more than {MAX_DOTS} parts", hint)
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = one_line(error)
        if isinstance(error, RecursionError):
            why = "too deeply nested"
        raise LoraFxError(f"{name}: not TOML: {why}", hint) from error

    large = next(_keys_of_large_integers(tables), None)
    if large is not None:
        raise LoraFxError(f"{name}: {large} has a whole number of more than 64 bits", hint)
    return tables


def _keys_of_large_integers(value: object, key: str = "it") -> Iterator[str]:
    """Yield the keys whose values hold a whole number of more than 64 bits."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _keys_of_large_integers(item, one_line(repr(name), 80))
    elif isinstance(value, list):
        for item in value:
            yield from _keys_of_large_integers(item, key)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        yield key
