"""The difference tuned − base of one tensor, one matrix at a time.

Both files are read by blocks; what is held is one Δ in fp32 (fp64 where either side is) and two
blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lora_fx.checkpoint.fold import arithmetic
from lora_fx.dtypes import Array, NumpyDtype
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import TensorInfo, stored_elements

BLOCK = 1 << 18
"""Elements of one block."""


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
    def dtype(self) -> NumpyDtype:
        """The dtype of Δ: fp64 where either side is, else fp32."""
        return np.dtype(arithmetic(self.base.dtype, self.tuned.dtype))

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
            sides = self.base, self.tuned
            found = (stored_elements(info, batch * size + lo, batch * size + hi) for info in sides)
            old, new = (block.astype(self.dtype, copy=False) for block in found)
            for info, block in zip(sides, (old, new), strict=True):
                if count := np.count_nonzero(~np.isfinite(block)):
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


def pair_of(key: str, base: TensorInfo, tuned: TensorInfo, lead: int) -> TensorPair:
    """A tensor of two checkpoints, of which `lead` leading axes count matrices."""
    shape = base.shape or (1,)
    sizes = math.prod(shape[:lead]), shape[lead], math.prod(shape[lead + 1 :])
    return TensorPair(key, base, tuned, *sizes)


def _squares(block: Array) -> float:
    wide = block.astype(np.float64, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(wide, wide))
