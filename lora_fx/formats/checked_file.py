"""Tensors and numbers from a foreign file, checked and converted to fp32."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import finite, is_float

Arrays = Mapping[str, Array]
"""Tensors by name, or the tensors of a module by the ends of their names."""


@dataclass(frozen=True)
class File:
    """A file that is being read.

    Attributes:
        name: For messages.
        notes: What should be said to the user.
    """

    name: str
    notes: list[str] = field(default_factory=list)

    def master(self, name: str, array: Array) -> Array:
        """Return one tensor as contiguous fp32; raise as `check` does."""
        self.check(name, array)
        master = np.ascontiguousarray(array, np.float32)
        if array.dtype == np.float64 and not np.array_equal(master, array):
            self.notes.append(f"{self.name}: {name!r} was rounded from fp64 to fp32")
        return master

    def check(self, name: str, array: Array) -> None:
        """Check that a tensor holds finite floats.

        Raises:
            LoraFxError: It is empty, no float, or not finite.
        """
        if array.size == 0:
            raise self.error(name, f"has shape {list(array.shape)}; expected no size of 0")
        if not is_float(array):
            raise self.error(
                name,
                f"has dtype {array.dtype}; expected a float dtype",
                "save the adapter in fp32, fp16 or bf16",
            )
        self.check_finite(name, array)

    def vector(self, name: str, array: Array, size: int) -> Array:
        """Return a magnitude or a bias as fp32 [size]; PEFT adds axes of size 1."""
        if array.size != size or size not in array.shape:
            raise self.error(
                name,
                f"has shape {list(array.shape)}; expected {size} numbers, one for each row of B",
                "check that it comes from the same file as B",
            )
        return self.master(name, array).reshape(-1)

    def check_finite(self, name: str, array: Array) -> None:
        """Raise for a float tensor that holds NaN or Inf."""
        if not finite(array):
            raise self.error(
                name,
                "has NaN or infinite values; expected finite ones",
                "training may have diverged; use an earlier checkpoint",
            )

    def alpha(self, name: str, array: Array | str | None) -> float | None:
        """Return an alpha from a tensor, or from a text of the header; None without one.

        None means alpha = rank.

        Raises:
            LoraFxError: Not one finite number, or 0: that is rank to its trainers (kohya, LyCORIS)
                and no effect at all to other readers.
        """
        if array is None:
            return None
        value = self.number(name, array)
        if value == 0.0:
            raise self.error(
                name,
                "is 0; expected a finite number that is not 0",
                "some readers read 0 as the rank and others as no effect; write the intended "
                "number",
            )
        return value

    def number(self, name: str, array: Array | str) -> float:
        """Return the number in a tensor of one element, or in a text of the header.

        Raises:
            LoraFxError: A tensor of other sizes or another dtype, a text that is no number, or a
                number that is NaN or infinite.
        """
        if isinstance(array, str):
            try:
                array = np.asarray(float(array))
            except ValueError:
                raise self.error(name, f"is {array!r}; expected one number") from None
        if array.size != 1 or not (is_float(array) or array.dtype.kind in "iu"):
            raise self.error(name, f"is {array.dtype} {list(array.shape)}; expected one number")
        value = float(array.reshape(()))
        if not math.isfinite(value):
            raise self.error(
                name, f"is {value:g}; expected a finite number", "write the intended number"
            )
        return value

    def modules(
        self,
        tensors: Arrays,
        split: Callable[[str], tuple[str, str] | None],
        unknown: Callable[[str], LoraFxError],
    ) -> dict[str, dict[str, Array]]:
        """Group tensors by module and by the end of their names: {module: {end: tensor}}.

        Args:
            tensors: By the names of the file.
            split: Name → (module, end); None for a name that this kind of file does not have.
            unknown: A name for which `split` is None → the error.

        Raises:
            LoraFxError: A name that this kind of file does not have, or two tensors with one module
                and end.
        """
        modules: dict[str, dict[str, Array]] = {}
        for name, array in tensors.items():
            module_and_end = split(name)
            if module_and_end is None:
                raise unknown(name)
            module, end = module_and_end
            of_module = modules.setdefault(module, {})
            if end in of_module:
                raise self.error(name, f"is a second {end} of {module!r}; expected one")
            of_module[end] = array
        return modules

    def error(
        self, name: str, what: str, hint: str = "check that the file is complete"
    ) -> LoraFxError:
        """Return an error for one tensor."""
        return LoraFxError(f"{self.name}: {name!r} {what}", hint)


def module_and_part(pattern: re.Pattern[str], name: str) -> tuple[str, str] | None:
    """Return (module, end) of a tensor's name by a pattern's two groups; None without a match."""
    match = pattern.fullmatch(name)
    if match is None:
        return None
    return match[1], match[2]
