"""Matrices of codes: with columns in groups, and below each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.files.quantised.consistency import wrong
from lora_fx.ir.quantised import Quantised


def grouped(codes: Array, scale: Array, zero: Array | None, groups: Array) -> Quantised:
    """A matrix of codes [out, in] by the group of each column: neighbours, once these are sorted.

    Where groups are of several sizes each column has its own scale.
    """
    order, block = np.argsort(groups, kind="stable"), int(np.count_nonzero(groups == 0)) or 1
    even = np.array_equal(groups[order], np.arange(len(groups)) // block)
    if not even or -(-len(groups) // block) != scale.shape[1]:
        zero = None if zero is None else zero[:, groups]
        return Quantised(codes, scale[:, groups], zero, (1, 1))
    moved = None if np.array_equal(groups, groups[order]) else order
    codes = np.ascontiguousarray(codes if moved is None else codes[:, order])
    return Quantised(codes, scale, zero, (1, block), order=moved)


def below(where: str, parts: Sequence[Quantised]) -> Quantised:
    """Matrices below each other as one.

    Args:
        where: The name of the whole, for messages.
        parts: Of one format.

    Raises:
        LoraFxError: Their blocks are not alike, or do not end with them, or columns are moved.
    """
    first, zero = parts[0], None
    alike = all(q.block == first.block and q.shape == first.shape for q in parts)
    whole = not first.flat or first.codes.size % first.block[0] == 0
    if not (alike and whole) or any(q.order is not None for q in parts):
        raise wrong(where, "has matrices in blocks that differ", "blocks of one kind, none moved")
    if any(q.zero is not None for q in parts):
        zero = np.concatenate([np.zeros_like(q.scale) if q.zero is None else q.zero for q in parts])
    codes, scale = (np.concatenate([getattr(q, n) for q in parts]) for n in ("codes", "scale"))
    return replace(first, codes=codes, scale=scale, zero=zero)
