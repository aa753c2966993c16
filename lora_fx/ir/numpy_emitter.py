"""The emitter that computes with numpy immediately, for folds and tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import MistakeError


def _slice(x: Array, axis: int, start: int, stop: int) -> Array:
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, stop)
    return np.asarray(x[tuple(index)])


def _beside(x: Array, y: Array | float) -> Array:
    """Return the second operand for x; a number gets the dtype of x."""
    if isinstance(y, (int, float)):
        return np.asarray(y, x.dtype)
    return y


PRIMS: Mapping[str, Callable[..., object]] = {
    "matmul": np.matmul,
    "add": lambda x, y: x + _beside(x, y),
    "mul": lambda x, y: x * _beside(x, y),
    "div": lambda x, y: x / y,
    "norm": lambda x: np.sqrt(np.square(np.abs(x)).sum(-1, keepdims=True)),
    "detach": lambda x: x,
    "transpose": lambda x, perm: np.transpose(x, perm),
    "reshape": lambda x, shape: np.asarray(x).reshape(shape),
    "repeat": lambda x, times: np.repeat(x, times, -1),
    "slice": _slice,
    "pad": lambda x, before, after: np.pad(x, list(zip(before, after, strict=True))),
    "einsum": lambda x, y, equation: np.einsum(equation, x, y),
    "where": np.where,
    "gather": lambda x, ids: x[ids],
    "dropout": lambda x, p: x,
    "cast": lambda x, dtype: x.astype(numpy_dtype(dtype)),
    "cast_like": lambda x, y: x.astype(y.dtype),
}
"""The function that computes each primitive of lora_fx.ir.emitter.Ops; folds need no conv."""


@dataclass(frozen=True)
class NumpyEmitter:
    """An emitter that computes every primitive immediately, in the dtype of its operands."""

    def op(self, prim: str, *xs: Any, **attrs: Any) -> Array:
        """Compute one primitive of the closed set (see lora_fx.ir.emitter.Ops)."""
        if prim not in PRIMS:
            raise MistakeError(f"the numpy emitter has no primitive {prim!r}")
        return np.asarray(PRIMS[prim](*xs, **attrs))
