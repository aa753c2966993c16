"""Quantised matrices whose columns are in groups, and several below each other as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.files.quantised.consistency import wrong
from lora_fx.ir.quantised import Quantised


def grouped(codes: Array, scale: Array, zero: Array | None, groups: Array) -> Quantised:
    """A quantised matrix [out, in] whose columns share scales in groups.

    1. Where groups are of several sizes, or one has no column, each column has a scale of its own.
    2. Where the columns of a group are neighbours, a group is a block.
    3. Else columns are sorted by their group, and `order` tells where each was.

    Args:
        codes: [out, in].
        scale: [out, groups].
        zero: The same, or None.
        groups: The group of each column, [in].
    """
    order = np.argsort(groups, kind="stable")
    sorted_groups = groups[order]
    size = int(np.count_nonzero(groups == 0)) or 1
    are_even = np.array_equal(sorted_groups, np.arange(len(groups)) // size)
    n_groups = -(-len(groups) // size)
    if not are_even or n_groups != scale.shape[1]:
        if zero is not None:
            zero = zero[:, groups]
        return Quantised(codes, scale[:, groups], zero, (1, 1))
    if np.array_equal(groups, sorted_groups):
        return Quantised(np.ascontiguousarray(codes), scale, zero, (1, size))
    sorted_codes = np.ascontiguousarray(codes[:, order])
    return Quantised(sorted_codes, scale, zero, (1, size), order=order)


def below(where: str, matrices: Sequence[Quantised]) -> Quantised:
    """Matrices of one format, below each other as one.

    Args:
        where: The name of the whole, for messages.
        matrices: The matrices from the top.

    Raises:
        LoraFxError: Their blocks are not alike, or do not end with them, or columns are moved.
    """
    first = matrices[0]
    are_alike = all(q.block == first.block and q.shape == first.shape for q in matrices)
    have_whole_blocks = not first.flat or first.codes.size % first.block[0] == 0
    have_moved_columns = any(q.order is not None for q in matrices)
    if not are_alike or not have_whole_blocks or have_moved_columns:
        raise wrong(
            where,
            "has matrices with different blocks",
            "blocks of one size, in the order of the columns",
        )

    zero: Array | None = None
    if any(q.zero is not None for q in matrices):
        zero = np.concatenate([_zeros_of(q) for q in matrices])
    codes = np.concatenate([q.codes for q in matrices])
    scale = np.concatenate([q.scale for q in matrices])
    return replace(first, codes=codes, scale=scale, zero=zero)


def _zeros_of(q: Quantised) -> Array:
    """The zero points of a matrix, which are 0 where it has none."""
    if q.zero is None:
        return np.zeros_like(q.scale)
    return q.zero
