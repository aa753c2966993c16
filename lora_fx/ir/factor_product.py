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
    if not _is_cut(b, a):
        return np.matmul(b, a, out=out)

    rows, rank = b.shape
    columns = a.shape[1]
    if out is None:
        out = np.empty((rows, columns), np.float32)
    stacked_rows = rows // ROWS * ROWS
    b_pieces = b[:stacked_rows].reshape(-1, ROWS, rank)
    out_pieces = out[:stacked_rows].reshape(-1, ROWS, columns)

    width = _piece_width(rank, columns)
    for start in range(0, columns, width):
        piece = slice(start, min(columns, start + width))
        np.matmul(b_pieces, a[:, piece], out=out_pieces[:, :, piece])
        if stacked_rows < rows:  # the last rows with those before them, to make up a piece
            last = b[-ROWS:] @ a[:, piece]
            out[stacked_rows:, piece] = last[stacked_rows - rows :]
    return out


def _is_cut(b: Array, a: Array) -> bool:
    """Whether the product has the same bits in pieces, and is faster so."""
    rows, rank = b.shape
    columns = a.shape[1]
    if rows < ROWS or not 0 < rank <= RANK or columns % _REGISTER:
        return False
    if b.dtype != np.float32 or a.dtype != np.float32:
        return False
    return rows * columns * rank > SMALL and _small_is_fast()


def _piece_width(rank: int, columns: int) -> int:
    """The number of columns of a piece, so that all pieces are small and about equally wide."""
    widest = SMALL // (ROWS * rank) // _COLUMNS * _COLUMNS
    pieces = -(-columns // widest)
    return min(widest, -(-columns // (pieces * _COLUMNS)) * _COLUMNS)


@functools.cache
def _small_is_fast() -> bool:
    """True where every BLAS that is loaded has the kernels that this is about."""
    from threadpoolctl import threadpool_info

    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    kernels = {(library["internal_api"], library.get("architecture")) for library in libraries}
    return kernels == {_KERNELS}
