"""What builds a node in some IR, and the emitter that computes with numpy at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import MistakeError

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)


class Ops(Protocol[V_co]):
    """Builds the primitives of one closed set. A pass gets the wider `lora_fx.ir.graph.Emitter`.

    ========== ======================================= =========================
    prim       operands                                attributes
    ========== ======================================= =========================
    matmul     x, y, as numpy.matmul
    add, mul   x, y (broadcast); y may be a float
    div        x, y (broadcast)
    norm       x: its length along the last axis,
               which stays with size 1
    detach     x, through which no gradient flows
    transpose  x                                       perm
    reshape    x (sizes known)                         shape
    repeat     x: each column                          times
    slice      x                                       axis, start, stop
    pad        x, zeros around                         before, after (per axis)
    einsum     x, y                                    equation
    conv       x, w [g·out, in, *kernel]               stride padding dilation groups
    conv_tr…   x, w [g·in, out, *kernel]               the same and output_padding
    gather     x, ids                                  picks along axis 0
    dropout    x, in training                          p
    cast       x                                       dtype
    cast_like  x, y                                    x in the dtype of y
    ========== ======================================= =========================
    """

    def op(self, prim: str, *xs: object, **attrs: object) -> V_co:
        """Build the node, or compute the value, of one primitive of the table above."""


# The numpy emitter: fold computes with it, and tests look back with it.


def _slice(x: Array, axis: int, start: int, stop: int) -> Array:
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, stop)
    return np.asarray(x[tuple(index)])


def _beside(x: Array, y: Array | float) -> Array:
    """The second operand of x; a number takes the dtype of x."""
    return np.asarray(y, x.dtype) if isinstance(y, (int, float)) else y


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
    "gather": lambda x, ids: x[ids],
    "dropout": lambda x, p: x,
    "cast": lambda x, dtype: x.astype(numpy_dtype(dtype)),
    "cast_like": lambda x, y: x.astype(y.dtype),
}
"""What computes a primitive of lora_fx.ir.emitter.Ops; a fold needs no convolution."""


@dataclass(frozen=True)
class NumpyEmitter:
    """Computes every primitive at once, in the dtype of its operands."""

    def op(self, prim: str, *xs: Any, **attrs: Any) -> Array:
        """One primitive of the closed set (see lora_fx.ir.emitter.Ops)."""
        if prim not in PRIMS:
            raise MistakeError(f"the numpy emitter has no primitive {prim!r}")
        return np.asarray(PRIMS[prim](*xs, **attrs))


# The product b @ a of a low-rank update, in the pieces that BLAS is fastest with.
#
# The two factors are thin, so the product costs less than what OpenBLAS does before it: it copies
# both into an order of its own. Its AVX-512 kernels for small products leave the copies out, and
# take half the time at rank 16. Every sum runs over the rank in one order either way, so the result
# has the same bits where columns fill whole registers. Elsewhere, and with the kernels of other
# processors, it has not, and the product is not cut.


SMALL = 10**6
"""Up to this rows · columns · rank, OpenBLAS takes a product for a small one."""
RANK = 128
"""Above this rank, the kernels for small products are the slower ones."""
ROWS = 16
"""Rows of a piece. Fewer rows would be summed in another order, and give other bits."""
_KERNELS = ("openblas", "SkylakeX")  # which Intel and AMD processors with AVX-512 use
_REGISTER = 16  # columns
_COLUMNS = 64  # a piece has a multiple of them


def product(b: Array, a: Array, out: Array | None = None) -> Array:
    """The product of b [rows, rank] and a [rank, columns].

    `out` may be a C-contiguous array to compute in.
    """
    (rows, rank), columns = b.shape, a.shape[1]
    cut = rows >= ROWS and 0 < rank <= RANK and columns % _REGISTER == 0
    single = b.dtype == a.dtype == np.float32
    if not (cut and single and rows * columns * rank > SMALL and _small_is_fast()):
        return np.matmul(b, a, out=out)
    if out is None:
        out = np.empty((rows, columns), np.float32)
    most = SMALL // (ROWS * rank) // _COLUMNS * _COLUMNS
    pieces = -(-columns // most)
    step = min(most, -(-columns // (pieces * _COLUMNS)) * _COLUMNS)
    whole = rows // ROWS * ROWS
    above = b[:whole].reshape(-1, ROWS, rank)
    into = out[:whole].reshape(-1, ROWS, columns)
    for left in range(0, columns, step):
        right = min(columns, left + step)
        np.matmul(above, a[:, left:right], out=into[:, :, left:right])
        if whole < rows:
            out[whole:, left:right] = (b[-ROWS:] @ a[:, left:right])[whole - rows :]
    return out


@functools.cache
def _small_is_fast() -> bool:
    """True where every BLAS that is loaded has the kernels that this is about."""
    from threadpoolctl import threadpool_info

    blas = [x for x in threadpool_info() if x["user_api"] == "blas"]
    kinds = {(x["internal_api"], x.get("architecture")) for x in blas}
    return kinds == {_KERNELS}
