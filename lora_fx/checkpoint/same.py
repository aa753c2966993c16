"""Two checkpoints compared tensor by tensor: names, shapes, dtypes and values, streamed.

rel = max|a − b| / max|b| of a tensor, both in fp64. Equal bytes are equal, whatever they mean; NaN
or an infinity on one side only, and a difference where b is all zero, are infinite.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.files.copying import read_at
from lora_fx.files.safetensors import DTYPES, TensorInfo

CHUNK = 1 << 18
"""Elements of a block."""
_BITS = dict(DTYPES.values())


@dataclass(frozen=True)
class Unlike:
    """A tensor that differs: what, by how much, and in how many of its elements."""

    tensor: str
    what: str
    rel: float = math.inf
    max_abs: float = math.inf
    elements: int = 0

    def to_json(self) -> dict[str, object]:
        """Plain values; an infinite difference is null."""
        return {
            "key": self.tensor,
            "what": self.what,
            "rel": self.rel if math.isfinite(self.rel) else None,
            "max_abs": self.max_abs if math.isfinite(self.max_abs) else None,
            "elements": self.elements,
        }


def unlike(
    a: Mapping[str, TensorInfo], b: Mapping[str, TensorInfo], tol: float = 0.0
) -> Iterator[Unlike]:
    """Every tensor of `a` that is not that of `b`, the reference.

    Args:
        a: Tensors of one checkpoint.
        b: Of the other.
        tol: Gate on rel. Above 0, tensors of different dtypes are compared by their values; at 0
            they differ.
    """
    for name in b:
        if name not in a:
            yield Unlike(name, "is missing in A")
    for name, ours in a.items():
        theirs = b.get(name)
        if theirs is None:
            yield Unlike(name, "is missing in B")
        elif ours.shape != theirs.shape:
            yield Unlike(name, f"is {list(ours.shape)}; expected {list(theirs.shape)}")
        elif ours.dtype != theirs.dtype and not tol:
            yield Unlike(name, f"is {ours.dtype}; expected {theirs.dtype}")
        else:
            found = _values(name, ours, theirs)
            if found is not None and not found.rel <= tol:
                yield found


def _values(name: str, ours: TensorInfo, theirs: TensorInfo) -> Unlike | None:
    """How the values of two tensors of one shape differ; None where they are equal."""
    if ours.dtype == theirs.dtype and _same_bytes(ours, theirs):
        return None
    if _BITS[ours.dtype] % 8 or _BITS[theirs.dtype] % 8 or "complex" in ours.dtype:
        return Unlike(name, "its bytes differ")
    gap = top = 0.0
    count = 0
    size = math.prod(ours.shape)
    with open(ours.file, "rb") as f, open(theirs.file, "rb") as g:
        for low in range(0, size, CHUNK):
            n = min(CHUNK, size - low)
            x, y = _block(f.fileno(), ours, low, n), _block(g.fileno(), theirs, low, n)
            count += int(np.count_nonzero(x != y))
            wide, reference = x.astype(np.float64), y.astype(np.float64)
            finite = np.isfinite(reference)
            same = np.isfinite(wide) == finite
            if not same.all() or not np.array_equal(wide[~finite], reference[~finite]):
                return Unlike(name, "has NaN or infinite values where the other has not")
            gap = max(gap, float(np.abs(wide - reference)[finite].max(initial=0.0)))
            top = max(top, float(np.abs(reference)[finite].max(initial=0.0)))
    if not count:  # −0 and 0
        return None
    rel = gap / top if top else math.inf
    share = count / size
    what = f"{count} of {size} elements ({share:.1%}) differ, by up to {gap:.2e} (rel {rel:.2e})"
    return Unlike(name, what, max(rel, math.ulp(0.0)), gap, count)


def _same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    if a.start == b.start and os.path.samefile(a.file, b.file):
        return True
    with open(a.file, "rb") as f, open(b.file, "rb") as g:
        for at in range(0, a.stop - a.start, 4 * CHUNK):
            n = min(4 * CHUNK, a.stop - a.start - at)
            if read_at(f.fileno(), n, a.start + at) != read_at(g.fileno(), n, b.start + at):
                return False
    return True


def _block(fd: int, info: TensorInfo, low: int, count: int) -> Array:
    dtype = numpy_dtype(info.dtype)
    raw = read_at(fd, count * dtype.itemsize, info.start + low * dtype.itemsize)
    return np.frombuffer(raw, dtype)
