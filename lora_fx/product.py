"""The product b @ a of a low-rank update, in the pieces that BLAS is fastest with.

The two factors are thin, so that a product costs less than what OpenBLAS does before it: copying
both into an order of its own. For small products its kernels for AVX-512 leave that out, and take
half the time at rank 16. Every sum runs over the rank in one order either way, so the numbers are
the same bits where columns come in whole registers; elsewhere, and with other processors' kernels,
they are not, and the product is not cut.
"""

from __future__ import annotations

import functools

import numpy as np

from lora_fx.dtypes import Array

SMALL = 10**6
"""Rows · columns · rank that OpenBLAS takes for a small product."""
RANK = 128
"""Above it, the kernels for small products are the slower ones."""
ROWS = 16
"""Rows of a piece: fewer are summed in another order."""
_KERNELS = ("openblas", "SkylakeX")  # which Intel and AMD processors with AVX-512 use
_REGISTER = 16  # columns
_COLUMNS = 64  # a piece has a multiple of them


def product(b: Array, a: Array, out: Array | None = None) -> Array:
    """The product of b [rows, rank] and a [rank, columns]; `out`: a C-contiguous array for it."""
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
    """True where numpy's BLAS has the kernels that this is about, and no other BLAS is loaded."""
    from threadpoolctl import threadpool_info

    blas = [x for x in threadpool_info() if x["user_api"] == "blas"]
    kinds = {(x["internal_api"], x.get("architecture")) for x in blas}
    return kinds == {_KERNELS}
