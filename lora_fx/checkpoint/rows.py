"""Rows of a stored tensor, and what must be known of all of them before the first is folded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_fx.adapter.initial import residual
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import factors, squares
from lora_fx.checkpoint.blocks import Fold, Space, rows_per_block
from lora_fx.checkpoint.rectangles import Rectangle
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.files.copying import read_into
from lora_fx.files.safetensors import TensorInfo


def prepared(fold: Fold, source: TensorInfo) -> Fold:
    """The fold with what needs the whole tensor: DoRA's column factors, and changed bases.

    A base that an initialisation changed is held whole; the norms are summed up block by block.
    """
    residuals = {
        i: _residual(fold, p, source)
        for i, p in enumerate(fold.matrix.parts)
        if isinstance(p.change, LowRank) and p.change.extra.get("mutated")
    }
    fold = replace(fold, residuals=residuals) if residuals else fold
    columns = {
        i: factors(p.magnitude, _column_squares(fold, i, p, source), f"tensor {fold.name!r}")
        for i, p in enumerate(fold.matrix.parts)
        if p.magnitude is not None and p.transposed
    }
    return replace(fold, columns=columns) if columns else fold


def _residual(fold: Fold, p: Rectangle, source: TensorInfo) -> Array:
    """What is left of W when the part that the update started from is taken off, as stored."""
    assert isinstance(p.change, LowRank)
    with open(source.file, "rb") as f:
        old = read_rows(f.fileno(), source, p.top, p.bottom - p.top, fold.matrix.columns)
    weight = old[:, p.left : p.right]
    left = residual(weight.T if p.transposed else weight, p.change, f"tensor {fold.name!r}")
    return left.T if p.transposed else left


def _column_squares(fold: Fold, i: int, p: Rectangle, source: TensorInfo) -> Array:
    """Sums of squares of W + ΔW along its columns, fp64."""
    sums = np.zeros(p.right - p.left, np.float64)
    step = rows_per_block(fold.matrix.columns)
    with open(source.file, "rb") as f:
        for low in range(p.top, p.bottom, step):
            n = min(step, p.bottom - low)
            delta = p.delta(low, low + n)
            old = read_rows(f.fileno(), source, low, n, fold.matrix.columns)[:, p.left : p.right]
            if i in fold.residuals:
                old = fold.residuals[i][low - p.top : low - p.top + n]
            sums += squares((old.astype(delta.dtype) + delta).T)
    return sums


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
