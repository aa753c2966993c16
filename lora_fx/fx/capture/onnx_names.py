"""The names of inputs and outputs in an ONNX file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lora_fx.conditions import Condition


def onnx_conditions(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """Conditions over the inputs' names in an ONNX file."""
    return tuple(
        replace(c, sizes=tuple((s, onnx_name(n), d) for s, n, d in c.sizes)) for c in conditions
    )


_CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")


def onnx_name(path: str) -> str:
    """The name of an input or output in an ONNX file: dots stay where runtimes look for them.

    >>> onnx_name("pair.0"), onnx_name("past_key_values.0.key")
    ('pair_0', 'past_key_values.0.key')
    """
    return path if _CACHE.fullmatch(path) else path.replace(".", "_")


def symbols_of(free: Mapping[str, Mapping[int, str]]) -> dict[tuple[str, int], str]:
    """(ONNX input, dimension) → the name of one that stays free, as a Door gives them."""
    return {(onnx_name(name), d): s for name, dims in free.items() for d, s in dims.items()}


def output_name(path: str) -> str:
    """The name of a flat output: its field in a dict or output class, else output, output_1."""
    name = path.lstrip(".")
    if not name or name.split(".")[0].isdigit():
        return f"output_{name.replace('.', '_')}" if name and name != "0" else "output"
    return onnx_name(name)
