"""Tensors of a foreign file as fp32 masters and numbers, checked on the way in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import finite, is_float


@dataclass(frozen=True)
class File:
    """What reading one file needs everywhere: its name for messages, and the notes."""

    name: str
    notes: list[str] = field(default_factory=list)

    def master(self, name: str, array: Array) -> Array:
        """One tensor as contiguous fp32.

        Raises:
            LoraFxError: It is empty, no float, or not finite.
        """
        if array.size == 0:
            raise self.error(name, f"has shape {list(array.shape)}; expected no size of 0")
        if not is_float(array):
            raise self.error(name, f"has dtype {array.dtype}; expected a float dtype")
        if not finite(array):
            raise self.error(name, "has NaN or infinite values; expected finite ones")
        master = np.ascontiguousarray(array, np.float32)
        if array.dtype == np.float64 and not np.array_equal(master, array):
            self.notes.append(f"{self.name}: {name!r} was rounded from fp64 to fp32")
        return master

    def alpha(self, name: str, array: Array | None) -> float | None:
        """The number in an alpha tensor; None where there is none, which means alpha = rank.

        Raises:
            LoraFxError: Not one finite number, or 0: that is rank to its trainers (kohya, LyCORIS)
                and no effect at all to other readers.
        """
        if array is None:
            return None
        if array.size != 1 or not (is_float(array) or array.dtype.kind in "iu"):
            raise self.error(name, f"is {array.dtype} {list(array.shape)}; expected one number")
        value = float(array.reshape(()))
        if not math.isfinite(value) or value == 0.0:
            raise LoraFxError(
                f"{self.name}: {name!r} is {value:g}; expected a finite number that is not 0",
                "some readers take 0 as the rank and some as no effect; write the number you mean",
            )
        return value

    def error(self, name: str, what: str, hint: str = "is the file complete?") -> LoraFxError:
        """An error about one tensor."""
        return LoraFxError(f"{self.name}: {name!r} {what}", hint)
