"""Scales of weights in floats of 8 bits and of 4: rules that make them, and stored exponents.

A rule takes the largest values of blocks, in fp32, and returns their scales as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora_fx.dtypes import Array, finfo
from lora_fx.files.quantised.weight_parts import Parts

EXPONENTS = ("uint8", "float8_e8m0fnu")
"""dtypes of scales that are powers of two, stored as 127 + their exponent."""
TOP = 448.0
"""The largest value of float8_e4m3fn."""


def largest_to_top(dtype: str) -> Callable[[Array], Array]:
    """The rule of scales that make the largest value of a block the largest of its dtype."""
    return lambda largest: largest / np.float32(finfo(dtype).max)


def power_above(dtype: str) -> Callable[[Array], Array]:
    """The same rule, rounded up to a power of two, as DeepSeek-V3.1 has them."""
    exact = largest_to_top(dtype)
    return lambda largest: np.exp2(np.ceil(np.log2(exact(largest))))


def exponents(top: int) -> Callable[[Array], Array]:
    """The rule of microscaling formats (6.3): 127 + ⌊log2 largest⌋ − top.

    Args:
        top: The exponent of the largest value of the format.
    """

    def rule(largest: Array) -> Array:
        exponent = np.frexp(largest)[1] - 1  # ⌊log2 largest⌋
        return np.asarray(np.clip(exponent - top + 127, 0, 254))

    return rule


def powers(parts: Parts, exponents: Array, name: str = "weight_scale") -> Array:
    """Scales of microscaling formats in fp32, from their exponents as they are stored.

    Args:
        parts: The module's.
        exponents: Bytes, in one of the dtypes of `EXPONENTS`.
        name: The part that holds them, for messages.

    Raises:
        LoraFxError: A scale that is no number.
    """
    stored = exponents.view(np.uint8)
    if (stored == 255).any():
        raise parts.wrong(name, "has an exponent of 255, which means NaN", "0 to 254")
    return np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
