"""The difference tuned − base of two checkpoints, one matrix at a time.

Both files are read by blocks with plain reads; nothing is mapped, and what is held is one Δ in
fp32 (fp64 where either side is) and two blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lora_fx.dtypes import DTYPES, FLOATING, Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.copying import read_into
from lora_fx.files.read import open_input
from lora_fx.files.safetensors import TensorInfo, Tensors, reading, stored_bytes
from lora_fx.text import Json

BLOCK = 1 << 18
"""Elements of one block."""
CHUNK = 1 << 20
"""Bytes that are compared at once."""


@dataclass(frozen=True)
class TensorPair:
    """The same tensor of two checkpoints, seen as `batch` matrices of rows × columns as stored.

    Elements are numbered in stored order, so that a matrix and a block of its rows are ranges.
    """

    key: str
    base: TensorInfo
    tuned: TensorInfo
    batch: int
    rows: int
    columns: int

    @property
    def dtype(self) -> np.dtype[np.float32] | np.dtype[np.float64]:
        """The dtype of Δ: fp64 where either side is, else fp32."""
        wide = "float64" in (self.base.dtype, self.tuned.dtype)
        return np.dtype(np.float64) if wide else np.dtype(np.float32)

    def delta(self, batch: int) -> tuple[Array, float, float]:
        """One matrix of Δ, ‖Δ‖² and ‖base‖² of it in fp64.

        Raises:
            LoraFxError: NaN or infinite values on either side.
        """
        size = self.rows * self.columns
        result = np.empty(size, self.dtype)
        changed = original = 0.0
        for lo in range(0, size, BLOCK):
            hi = min(lo + BLOCK, size)
            at = batch * size
            old = read_floats(self.base, at + lo, at + hi, self.dtype)
            new = read_floats(self.tuned, at + lo, at + hi, self.dtype)
            for info, block in ((self.base, old), (self.tuned, new)):
                if not math.isfinite(_squares(block)) and not np.isfinite(block).all():
                    count = int(np.count_nonzero(~np.isfinite(block)))
                    raise LoraFxError(
                        f"{info.file}: tensor {self.key!r} has {count} NaN or infinite values (or "
                        "more); expected finite ones",
                        "training may have diverged; use an earlier checkpoint, or --exclude the "
                        "tensor",
                    )
            np.subtract(new, old, out=result[lo:hi])
            changed += _squares(result[lo:hi])
            original += _squares(old)
        if not math.isfinite(changed):
            raise LoraFxError(
                f"{self.tuned.file}: tensor {self.key!r} minus that of {self.base.file} overflows",
                "are the two of one model? --exclude leaves the tensor out",
            )
        return result.reshape(self.rows, self.columns), changed, original


def pairs(base: Tensors, tuned: Tensors, stacks: Mapping[str, int]) -> Iterator[TensorPair]:
    """Every tensor of both sides that has one shape, in the order of `base`.

    Args:
        base: Tensors by name.
        tuned: Tensors by name.
        stacks: Number of leading axes that count matrices, where it is not 0.
    """
    for key, old in base.items():
        new = tuned.get(key)
        if new is None or new.shape != old.shape:
            continue
        lead = stacks.get(key, 0)
        shape = old.shape or (1,)
        rows = shape[lead] if lead < len(shape) else 1
        yield TensorPair(key, old, new, math.prod(shape[:lead]), rows, math.prod(shape[lead + 1 :]))


def read_floats(info: TensorInfo, lo: int, hi: int, dtype: np.dtype[np.generic]) -> Array:
    """Elements lo ≤ i < hi of a float tensor, widened to `dtype`."""
    if info.dtype not in FLOATING:
        raise LoraFxError(
            f"{info.file}: a tensor of {info.dtype}; expected floats",
            "compare checkpoints of floats",
        )
    raw = _stored(info, lo, hi)
    if info.dtype == "bfloat16":  # the upper half of an fp32: faster than ml_dtypes' own cast
        raw = np.left_shift(raw.view("<u2"), 16, dtype=np.uint32).view(np.float32)
    return np.asarray(raw.astype(dtype, copy=False))


def _stored(info: TensorInfo, lo: int, hi: int) -> Array:
    """Elements lo ≤ i < hi of a tensor in its own dtype."""
    dtype = numpy_dtype(info.dtype)
    return stored_bytes(info, lo * dtype.itemsize, hi * dtype.itemsize).view(dtype)


def same_bytes(a: TensorInfo | Array, b: TensorInfo | Array) -> bool:
    """True where two tensors, stored or arrays, have one dtype and shape and are equal bit by bit.

    Reading stops at the first block that differs: either may be larger than memory.

    Raises:
        LoraFxError: A file ends inside its tensor, or cannot be read.
    """
    if (str(a.dtype), a.shape) != (str(b.dtype), b.shape):
        return False
    if (
        isinstance(a, TensorInfo)
        and isinstance(b, TensorInfo)
        and a.start == b.start
        and os.path.samefile(a.file, b.file)
    ):
        return True
    return all(x == y for x, y in zip(_blocks(a), _blocks(b), strict=True))


def _blocks(tensor: TensorInfo | Array) -> Iterator[bytearray]:
    """The bytes of a tensor, CHUNK at a time.

    Always in the same buffer, since new ones would cost page faults; behind the last, shorter block
    are still bytes of the one before. A bytearray, because comparing two of them took a sixth of
    the time of np.array_equal.
    """
    block = bytearray(CHUNK)
    if isinstance(tensor, TensorInfo):
        with reading(tensor), open_input(tensor.file) as file:
            for lo in range(tensor.start, tensor.stop, CHUNK):
                read_into(file.fileno(), memoryview(block)[: tensor.stop - lo], lo)
                yield block
    else:
        flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        for lo in range(0, len(flat), CHUNK):
            part = flat[lo : lo + CHUNK]
            block[: len(part)] = part.data
            yield block


def _squares(block: Array) -> float:
    wide = block.astype(np.float64, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(wide, wide))


# Two checkpoints compared tensor by tensor: names, shapes, dtypes and values, streamed.
#
# rel = max|a − b| / max|b| of a tensor, both in fp64. Equal bytes are equal, whatever they mean;
# NaN or an infinity on one side only, and a difference where b is all zero, are infinite.


@dataclass(frozen=True)
class Difference:
    """A tensor that is not what it should be.

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
        sizes = {"ratio": self.ratio, "rel": self.rel, "max_abs": self.max_abs}
        finite = {name: x if math.isfinite(x) else None for name, x in sizes.items()}
        return {"key": self.tensor, "what": self.what, **finite, "elements": self.elements}


def unlike(a: Tensors, b: Tensors, tol: float = 0.0) -> Iterator[Difference]:
    """Every tensor of `a` that is not that of `b`, the reference.

    Args:
        a: Tensors of one checkpoint.
        b: Tensors of the other.
        tol: Gate on rel. Above 0, tensors of different dtypes are compared by their values; at 0
            they differ.
    """
    yield from (Difference(name, "is missing in A", elements=0) for name in b if name not in a)
    for name, ours in a.items():
        theirs = b.get(name)
        if theirs is None:
            yield Difference(name, "is missing in B", elements=0)
        elif ours.shape != theirs.shape:
            what = f"is {list(ours.shape)}; expected {list(theirs.shape)}"
            yield Difference(name, what, elements=0)
        elif ours.dtype != theirs.dtype and not tol:
            yield Difference(name, f"is {ours.dtype}; expected {theirs.dtype}", elements=0)
        else:
            found = _values(name, ours, theirs)
            if found is not None and not found.rel <= tol:
                yield found


def _values(name: str, ours: TensorInfo, theirs: TensorInfo) -> Difference | None:
    """How the values of two tensors of one shape differ; None where they are equal."""
    if same_bytes(ours, theirs):
        return None
    if DTYPES[ours.dtype].bits % 8 or DTYPES[theirs.dtype].bits % 8 or "complex" in ours.dtype:
        return Difference(name, "its bytes differ", elements=0)
    gap = top = 0.0
    count = 0
    size = math.prod(ours.shape)
    for low in range(0, size, BLOCK):
        x, y = (_stored(t, low, min(low + BLOCK, size)) for t in (ours, theirs))
        count += int(np.count_nonzero(x != y))
        wide, reference = x.astype(np.float64), y.astype(np.float64)
        finite = np.isfinite(reference)
        same = np.isfinite(wide) == finite
        if not same.all() or not np.array_equal(wide[~finite], reference[~finite]):
            what = "has NaN or infinite values where the other has not"
            return Difference(name, what, elements=0)
        gap = max(gap, float(np.abs(wide - reference)[finite].max(initial=0.0)))
        top = max(top, float(np.abs(reference)[finite].max(initial=0.0)))
    if not count:  # −0 and 0
        return None
    rel = gap / top if top else math.inf
    share = count / size
    what = f"{count} of {size} elements ({share:.1%}) differ, by up to {gap:.2e} (rel {rel:.2e})"
    return Difference(name, what, math.inf, max(rel, math.ulp(0.0)), gap, count)
