"""The difference tuned − base of two checkpoints, one matrix at a time.

Both files are read by blocks with plain reads; nothing is mapped, and what is held is one Δ in
fp32 (fp64 where either side is) and two blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import AGAIN, WEIGHTS, TensorInfo

BLOCK = 1 << 18
"""Elements of one block."""


@dataclass(frozen=True)
class Pair:
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
        """Of Δ: fp64 where either side is, else fp32."""
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
                if not math.isfinite(_squares(block)):
                    self._refuse_values(info, block)
            np.subtract(new, old, out=result[lo:hi])
            changed += _squares(result[lo:hi])
            original += _squares(old)
        if not math.isfinite(changed):
            raise LoraFxError(
                f"{self.tuned.file}: tensor {self.key!r} minus that of {self.base.file} overflows",
                "are the two of one model? --exclude leaves the tensor out",
            )
        return result.reshape(self.rows, self.columns), changed, original

    def same_bytes(self) -> bool:
        """True when both sides are equal bit by bit; stops at the first block that differs."""
        if (self.base.dtype, self.base.shape) != (self.tuned.dtype, self.tuned.shape):
            return False
        length = self.base.stop - self.base.start
        step = 4 * BLOCK
        return all(
            np.array_equal(
                read_bytes(self.base, lo, min(lo + step, length)),
                read_bytes(self.tuned, lo, min(lo + step, length)),
            )
            for lo in range(0, length, step)
        )

    def _refuse_values(self, info: TensorInfo, block: Array) -> None:
        finite = np.isfinite(block)
        if not finite.all():
            raise LoraFxError(
                f"{info.file}: tensor {self.key!r} has {int((~finite).sum())} NaN or infinite "
                "values (or more); expected finite ones",
                "training may have diverged; use an earlier checkpoint, or --exclude the tensor",
            )


def pairs(
    base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], stacks: Mapping[str, int]
) -> Iterator[Pair]:
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
        yield Pair(
            key,
            old,
            new,
            math.prod(shape[:lead]),
            shape[lead] if lead < len(shape) else 1,
            math.prod(shape[lead + 1 :]),
        )


def read_floats(info: TensorInfo, lo: int, hi: int, dtype: np.dtype[np.generic]) -> Array:
    """Elements lo ≤ i < hi of a float tensor, widened to `dtype`."""
    if info.dtype not in WEIGHTS:
        raise LoraFxError(f"{info.file}: a tensor of {info.dtype}; expected floats")
    if info.dtype == "bfloat16":  # the upper half of an fp32
        wide = np.left_shift(read_bytes(info, 2 * lo, 2 * hi).view("<u2"), 16, dtype=np.uint32)
        return np.asarray(wide.view(np.float32).astype(dtype, copy=False))
    width = numpy_dtype(info.dtype).itemsize
    raw = read_bytes(info, width * lo, width * hi).view(f"<f{width}")
    return np.asarray(raw.astype(dtype, copy=False))


def read_bytes(info: TensorInfo, lo: int, hi: int) -> Array:
    """Bytes lo ≤ i < hi of a tensor.

    Raises:
        LoraFxError: The file ends before them, or cannot be read.
    """
    result = np.empty(hi - lo, np.uint8)
    view, done = result.data, 0
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start + lo)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise LoraFxError(f"{info.file}: ends inside a tensor while it is read", AGAIN)
                done += count
    except OSError as e:
        raise LoraFxError(f"{info.file}: cannot be read: {e.strerror or e}", AGAIN) from e
    return result


def _squares(block: Array) -> float:
    wide = block.astype(np.float64, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(wide, wide))
