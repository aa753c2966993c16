"""Inputs that any programming language computes alike: a hash of each element's number.

docs/probe.md has the formula. The hash is in integers of 32 bits, and its upper 12 bits give the
element, a multiple of 1/1024 in [-2, 2) that float16 holds exactly.
"""

from __future__ import annotations

import numpy as np

from lora_fx.dtypes import Array, numpy_dtype

STEP = 0x9E3779B1
SEED_STEP = 0x85EBCA6B
FIRST_FACTOR = 0x7FEB352D
SECOND_FACTOR = 0x846CA68B
AT_ONCE = 1 << 20
"""The number of elements that are computed at a time."""


def drawn(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Return a tensor of drawn elements in row-major order.

    >>> drawn((2, 2), "float32", 1).tolist()
    [[1.0615234375, 1.08984375], [0.515625, -0.8974609375]]
    """
    result = np.empty(shape, numpy_dtype(dtype))
    flat = result.reshape(-1)
    offset = np.uint32((seed * SEED_STEP) % (1 << 32))
    for start in range(0, flat.size, AT_ONCE):
        stop = min(start + AT_ONCE, flat.size)
        x = np.arange(start + 1, stop + 1, dtype=np.uint32) * np.uint32(STEP) + offset
        x = (x ^ (x >> np.uint32(16))) * np.uint32(FIRST_FACTOR)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(SECOND_FACTOR)
        x ^= x >> np.uint32(16)
        steps = (x >> np.uint32(20)).astype(np.int32) - 2048
        flat[start:stop] = (steps / np.float32(1024)).astype(result.dtype)
    return result
