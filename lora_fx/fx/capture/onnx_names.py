"""The names of inputs and outputs in an ONNX file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lora_fx.conditions import Condition

_CACHE = re.compile(r"(past_key_values|present)\.\d+\.((decoder|encoder)\.)?(key|value)")


def onnx_name(path: str) -> str:
    """Return an input's or output's name in an ONNX file; dots stay only in names of a cache.

    >>> onnx_name("pair.0"), onnx_name("past_key_values.0.key")
    ('pair_0', 'past_key_values.0.key')
    """
    if _CACHE.fullmatch(path):
        return path
    return path.replace(".", "_")


def output_name(path: str) -> str:
    """Return a flat output's name: its field in a dict or output class, else output, output_1."""
    name = path.lstrip(".")
    if name in ("", "0"):
        return "output"
    if name.split(".")[0].isdigit():
        return f"output_{name.replace('.', '_')}"
    return onnx_name(name)


def onnx_conditions(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """Return conditions with the inputs' names in an ONNX file."""
    renamed: list[Condition] = []
    for condition in conditions:
        sizes = tuple((symbol, onnx_name(name), dim) for symbol, name, dim in condition.sizes)
        renamed.append(replace(condition, sizes=sizes))
    return tuple(renamed)


def symbols_of(free: Mapping[str, Mapping[int, str]]) -> dict[tuple[str, int], str]:
    """Return the symbol of each free dimension by (ONNX input, dimension)."""
    symbols: dict[tuple[str, int], str] = {}
    for name, dims in free.items():
        for dim, symbol in dims.items():
            symbols[onnx_name(name), dim] = symbol
    return symbols
