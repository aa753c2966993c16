"""Two checkpoints compared tensor by tensor: names, shapes, dtypes and values, streamed.

rel = max|a − b| / max|b| of a tensor, both in fp64. Equal bytes are equal, whatever they mean;
NaN or an infinity on one side only, and a difference where b is all zero, are infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lora_fx.checkpoint.rectangles import BLOCK
from lora_fx.dtypes import DTYPES, Array
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.files.stored_tensors import same_bytes, stored_elements
from lora_fx.text import Json, strict_json


@dataclass(frozen=True)
class Difference:
    """A tensor that differs from what it should be.

    Attributes:
        tensor: Its name.
        what: In words.
        ratio: In the proof of a merge, the largest error over what is allowed.
        rel: Between two files, max|a − b| / max|b|.
        max_abs: Between two files, max|a − b|.
        elements: How many elements of two files differ.
    """

    tensor: str
    what: str
    ratio: float = math.inf
    rel: float = math.inf
    max_abs: float = math.inf
    elements: int | None = None

    def to_json(self) -> Json:
        """Plain values; an infinite difference is null."""
        row: Json = strict_json(vars(self))
        return {"key": row.pop("tensor"), **row}


def unlike(a: Tensors, b: Tensors, tol: float = 0.0) -> Iterator[Difference]:
    """Find the tensors of `a` that differ from those of `b`, the reference.

    Args:
        a: Tensors of one checkpoint.
        b: Tensors of the other.
        tol: Gate on rel. Above 0, tensors of different dtypes are compared by their values; at 0
            they differ.
    """
    for name in b:
        if name not in a:
            yield Difference(name, "is missing in A", elements=0)
    for name, info in a.items():
        difference = _difference(name, info, b.get(name), tol)
        if difference is not None:
            yield difference


def _difference(
    name: str, ours: TensorInfo, theirs: TensorInfo | None, tol: float
) -> Difference | None:
    """The difference of a tensor from the reference; None if it is at most `tol`."""
    if theirs is None:
        return Difference(name, "is missing in B", elements=0)
    if ours.shape != theirs.shape:
        what = f"is {list(ours.shape)}; expected {list(theirs.shape)}"
        return Difference(name, what, elements=0)
    if ours.dtype != theirs.dtype and not tol:
        return Difference(name, f"is {ours.dtype}; expected {theirs.dtype}", elements=0)
    difference = _values(name, ours, theirs)
    if difference is None or difference.rel <= tol:
        return None
    return difference


def _values(name: str, ours: TensorInfo, theirs: TensorInfo) -> Difference | None:
    """The difference between the values of two tensors of one shape; None if they are equal."""
    if same_bytes(ours, theirs):
        return None
    if DTYPES[ours.dtype].bits % 8 or DTYPES[theirs.dtype].bits % 8 or "complex" in ours.dtype:
        return Difference(name, "its bytes differ", elements=0)

    gap = 0.0
    largest = 0.0
    count = 0
    size = math.prod(ours.shape)
    for low in range(0, size, BLOCK):
        high = min(low + BLOCK, size)
        block = stored_elements(ours, low, high)
        reference = stored_elements(theirs, low, high)
        count += int(np.count_nonzero(block != reference))
        block = block.astype(np.float64)
        reference = reference.astype(np.float64)
        finite = np.isfinite(reference)
        if not _same_outside(block, reference, finite):
            what = "has NaN or infinite values where the other has finite ones"
            return Difference(name, what, elements=0)
        gap = max(gap, float(np.abs(block - reference)[finite].max(initial=0.0)))
        largest = max(largest, float(np.abs(reference)[finite].max(initial=0.0)))
    if not count:  # −0 and 0
        return None

    rel = gap / largest if largest else math.inf
    what = (
        f"{count} of {size} elements ({count / size:.1%}) differ, by up to {gap:.2e} "
        f"(rel {rel:.2e})"
    )
    return Difference(name, what, math.inf, max(rel, math.ulp(0.0)), gap, count)


def _same_outside(block: Array, reference: Array, finite: Array) -> bool:
    """Whether two blocks have the same infinities in the same places, and no NaN.

    Args:
        block: Of one side.
        reference: Of the other.
        finite: Where the reference is finite.
    """
    if not np.array_equal(np.isfinite(block), finite):
        return False
    return np.array_equal(block[~finite], reference[~finite])
