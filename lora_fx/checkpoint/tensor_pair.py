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
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.stored_tensors import stored_elements

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
        """The dtype of Δ: fp64 if one side is fp64, else fp32."""
        return np.dtype(arithmetic(self.base.dtype, self.tuned.dtype))

    def delta(self, batch: int) -> tuple[Array, float, float]:
        """One matrix of Δ, ‖Δ‖² and ‖base‖² of it in fp64.

        Raises:
            LoraFxError: NaN or infinite values on either side.
        """
        size = self.rows * self.columns
        first = batch * size
        result = np.empty(size, self.dtype)
        changed = 0.0
        original = 0.0
        for low in range(0, size, BLOCK):
            high = min(low + BLOCK, size)
            base = self._finite(self.base, first + low, first + high)
            tuned = self._finite(self.tuned, first + low, first + high)
            np.subtract(tuned, base, out=result[low:high])
            changed += _squares(result[low:high])
            original += _squares(base)
        if not math.isfinite(changed):
            raise LoraFxError(
                f"{self.tuned.file}: tensor {self.key!r} minus the tensor of {self.base.file} "
                "overflows",
                "check that both are checkpoints of the same model; --exclude leaves the tensor "
                "out",
            )
        return result.reshape(self.rows, self.columns), changed, original

    def _finite(self, info: TensorInfo, low: int, high: int) -> Array:
        """Elements low ≤ i < high of one side, in Δ's dtype; raises where one is not finite."""
        block = stored_elements(info, low, high).astype(self.dtype, copy=False)
        count = np.count_nonzero(~np.isfinite(block))
        if count:
            raise LoraFxError(
                f"{info.file}: tensor {self.key!r} has {count} NaN or infinite values (or "
                "more); expected finite ones",
                "training may have diverged; use an earlier checkpoint, or --exclude the tensor",
            )
        return block


def pair_of(key: str, base: TensorInfo, tuned: TensorInfo, lead: int) -> TensorPair:
    """A tensor of two checkpoints, of which `lead` leading axes count matrices."""
    shape = base.shape or (1,)
    batch = math.prod(shape[:lead])
    columns = math.prod(shape[lead + 1 :])
    return TensorPair(key, base, tuned, batch, shape[lead], columns)


def _squares(block: Array) -> float:
    """The sum of squares of a block, in fp64."""
    wide = block.astype(np.float64, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(wide, wide))
