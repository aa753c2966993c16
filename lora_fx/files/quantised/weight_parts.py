"""The parts of one quantised weight: the tensors of a module, by their last names.

A format is a function of the parts of one weight. It checks their headers, says the format, the
bits and the shape of the weight, and returns a `QuantisedWeight`. Its `read` then reads the parts
themselves, or as much of them as some rows of the weight need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.consistency import checked, wrong
from lora_fx.files.quantised.packed_words import packed_range
from lora_fx.files.quantised.quantised_weight import ALL, Recoded, Recoding, Written
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.stored_tensors import stored, stored_bytes
from lora_fx.ir.quantised import Quantised

FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
"""dtypes whose elements are codes and numbers at once."""


@dataclass(frozen=True)
class Parts:
    """The tensors of a checkpoint, seen from one module.

    Attributes:
        module: The module's name, without a dot at its end.
        tensors: Full name → header, or content.
    """

    module: str
    tensors: Mapping[str, TensorInfo | Array]

    def has(self, part: str) -> bool:
        """True where the module has a tensor of this last name."""
        return self._full_name(part) in self.tensors

    def dtype(self, part: str) -> str:
        """The name of the dtype of a part that the module has."""
        return str(self.tensors[self._full_name(part)].dtype)

    def shape(
        self, part: str, dtypes: Collection[str], *shape: int | None, any_axes: bool = False
    ) -> tuple[int, ...]:
        """The shape of a part, once its header is checked.

        Args:
            part: Its last name.
            dtypes: The dtypes that it may have.
            shape: The shape that it has to have; None stands for any size.
            any_axes: Any shape will do.

        Raises:
            LoraFxError: It is missing, empty, or of another dtype or shape.
        """
        expected = " or ".join(dtypes)
        if not any_axes:
            expected += f" [{', '.join(str(size or 'any') for size in shape)}]"
        if not self.has(part):
            raise self.wrong(part, "is missing", expected)

        dtype = self.dtype(part)
        sizes = self.tensors[self._full_name(part)].shape
        fits = any_axes or _fits(sizes, shape)
        if dtype not in dtypes or not fits or 0 in sizes:
            raise self.wrong(part, f"is {dtype} {list(sizes)}", expected)
        return sizes

    def read(self, part: str, rows: slice = ALL, axis: int = 0) -> Array:
        """The content of a part whose header was checked, or a range of it along an axis."""
        tensor = self.tensors[self._full_name(part)]
        if isinstance(tensor, TensorInfo):
            return stored(tensor, rows, axis)
        if tensor.ndim == 0:
            return np.asarray(tensor)
        axes_before = (ALL,) * axis
        return np.asarray(tensor)[(*axes_before, rows)]

    def bytes(self, part: str, low: int, high: int) -> Array:
        """Bytes low ≤ i < high of a part; fewer where it is shorter."""
        tensor = self.tensors[self._full_name(part)]
        if isinstance(tensor, TensorInfo):
            return stored_bytes(tensor, low, min(high, tensor.stop - tensor.start))
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)[low:high]

    def wrong(self, part: str, found: str, expected: str) -> LoraFxError:
        """The error of a part; see `consistency.wrong`."""
        return wrong(self._full_name(part), found, expected)

    def checked(self, q: Quantised, part: str = "weight") -> Quantised:
        """A weight as it was read, whose parts fit each other; see `consistency.checked`."""
        return checked(self._full_name(part), q)

    def evenly(self, part: str, length: int, groups: int) -> int:
        """The length of each of the groups that an axis is cut into.

        Raises:
            LoraFxError: They are not of one length.
        """
        if length % groups:
            raise self.wrong(part, f"has {groups} groups", f"a number that divides {length} inputs")
        return length // groups

    def rescaling(
        self,
        names: tuple[str, str],
        high: int,
        rule: Callable[[Array], Array],
        scale_of: Callable[[Array], Array] = lambda stored: stored.astype(np.float32),
        pack: Callable[[Array], Array] = lambda codes: codes,
    ) -> Recoding:
        """The recoding with new scales for the blocks that change, and the nearest codes.

        Args:
            names: The parts of codes and of scales, both with rows along their first axes.
            high: Rows that share scales.
            rule: Largest value of a block → its scale as it is stored.
            scale_of: Scales as they are stored → what a step of the codes is worth.
            pack: Codes of some rows → as they are stored.
        """
        codes_part, scales_part = names
        codes_name = self._full_name(codes_part)
        scales_name = self._full_name(scales_part)

        def recode(q: Quantised, rows: slice, weight: Array, delta: Array) -> Recoded:
            rows_of_scales = packed_range(rows, high)
            scales_before = self.read(scales_part, rows_of_scales)
            scales = q.rescaled(scales_before, weight, delta, rule)
            steps = scale_of(scales).reshape(q.scale.shape)
            if not np.isfinite(steps).all():
                row = int(np.argwhere(~np.isfinite(steps))[0, 0]) * high
                raise LoraFxError(
                    f"tensor {scales_name!r}: {scales.dtype} cannot hold the scale of row "
                    f"{rows.start + row}, whose largest value is {np.abs(weight[row]).max():g}",
                    "check the adapter and its scale",
                )
            recoded = replace(q, scale=steps).nearest(weight, 8)
            return recoded, [
                Written(codes_name, pack(recoded.codes), rows.start),
                Written(scales_name, scales, rows_of_scales.start),
            ]

        return Recoding(recode, (codes_name, scales_name), "new")

    def by_stored_scales(
        self,
        part: str,
        bits: int,
        pack: Callable[[Array], Array] = lambda codes: codes,
        axis: int | None = 0,
        place: Callable[[int], int] = lambda row: row,
    ) -> Recoding:
        """The recoding with the nearest codes by the scales that are stored.

        Args:
            part: The part of codes.
            bits: The bits of a code.
            pack: Codes of some rows → as they are stored.
            axis: The axis of the tensor that counts rows; None where its bytes do.
            place: Row → where it begins along the axis.
        """
        name = self._full_name(part)

        def recode(q: Quantised, rows: slice, weight: Array, delta: Array) -> Recoded:
            recoded = q.nearest(weight, bits)
            codes = pack(recoded.in_place())
            return recoded, [Written(name, codes, place(rows.start), axis)]

        return Recoding(recode, (name,))

    def _full_name(self, part: str) -> str:
        """The name of a part in the checkpoint."""
        return f"{self.module}.{part}"


def _fits(sizes: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """True where a shape is as expected, in which None stands for any size."""
    if len(sizes) != len(expected):
        return False
    pairs = zip(sizes, expected, strict=True)
    return all(expected_size in (None, size) for size, expected_size in pairs)
