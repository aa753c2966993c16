"""Rows of a stored tensor, and what must be known of all of them before the first is folded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_fx.checkpoint.blocks import Fold, Space, rows_per_block
from lora_fx.checkpoint.copying import read_into
from lora_fx.checkpoint.strict import TensorInfo
from lora_fx.lowrank import Array
from lora_fx.numeric import numpy_dtype


def column_norms(fold: Fold, source: TensorInfo) -> Fold:
    """The fold with the norms that DoRA of a weight stored [in, out] needs before the first row."""
    norms: dict[int, Array] = {}
    for i, p in enumerate(fold.matrix.parts):
        if p.magnitude is None or not p.transposed:
            continue
        squares = np.zeros(p.right - p.left, np.float64)
        step = rows_per_block(fold.matrix.columns)
        with open(source.file, "rb") as f:
            for low in range(p.top, p.bottom, step):
                n = min(step, p.bottom - low)
                delta = p.delta(low, low + n)
                old = read_rows(f.fileno(), source, low, n, fold.matrix.columns)
                sums = old.astype(delta.dtype)[:, p.left : p.right] + delta
                squares += np.einsum("ij,ij->j", sums, sums, dtype=np.float64)
        norms[i] = np.sqrt(squares).astype(p.magnitude.dtype)
    return replace(fold, norms=norms) if norms else fold


def read_rows(
    fd: int, info: TensorInfo, low: int, count: int, columns: int, space: Space | None = None
) -> Array:
    """Rows low ≤ i < low + count of a stored tensor that is seen with `columns` columns."""
    old = (space or Space()).array("old", (count, columns), numpy_dtype(info.dtype))
    row = old.itemsize * columns
    try:
        read_into(fd, old.view(np.uint8).reshape(-1).data, info.start + low * row)
    except OSError as error:  # says which file, as a descriptor cannot
        error.filename = str(info.file)
        raise
    return old
