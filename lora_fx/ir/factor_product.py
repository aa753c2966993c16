"""The product b @ a of a low-rank update, in the pieces that BLAS is fastest with.

The two factors are thin, so the product costs less than what OpenBLAS does before it: it copies
both into an order of its own. Its AVX-512 kernels for small products leave the copies out, and
take half the time at rank 16. Every sum runs over the rank in one order either way, so the result
has the same bits where columns fill whole registers. Elsewhere, and with the kernels of other
processors, it has not, and the product is not cut.
"""

from __future__ import annotations

import functools

import numpy as np

from lora_fx.dtypes import Array

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
