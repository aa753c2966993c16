"""Scales of floats of 8 bits and of 4: rules that make them, and exponents that are stored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora_fx.dtypes import Array, finfo
from lora_fx.files.quantised.weight_parts import Parts

EXPONENTS = ("uint8", "float8_e8m0fnu")


TOP = 448.0
"""The largest value of float8_e4m3fn."""


def largest_to_top(dtype: str) -> Callable[[Array], Array]:
    """The rule of scales that make the largest value of a block the largest of its dtype."""
    return lambda largest: largest / np.float32(finfo(dtype).max)


def power_above(dtype: str) -> Callable[[Array], Array]:
    """The same, rounded up to a power of two, as DeepSeek-V3.1 has them."""
    exact = largest_to_top(dtype)
    return lambda largest: np.exp2(np.ceil(np.log2(exact(largest))))


def exponents(top: int) -> Callable[[Array], Array]:
    """The rule of microscaling formats (6.3): 127 + ⌊log2 largest⌋ − the exponent of the top."""
    return lambda largest: np.clip(np.frexp(largest)[1] - 1 - top + 127, 0, 254)


def powers(parts: Parts, exponents: Array, name: str = "weight_scale") -> Array:
    """Scales of microscaling formats, fp32.

    Raises:
        LoraFxError: One that is no number.
    """
    raw = exponents.view(np.uint8)
    if (raw == 255).any():
        raise parts.wrong(name, "has an exponent of 255, which is no number", "0 to 254")
    return np.ldexp(np.float32(1), raw.astype(np.int32) - 127)
