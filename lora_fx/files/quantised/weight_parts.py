"""What every format of quantised weights needs: parts by name, and checks that name them.

A format is a function of the parts of one weight. It checks their headers, says the format, the
bits and the shape of the weight, and hands back a `QuantisedWeight`, whose `read` then reads the
parts themselves, or what some rows of the weight need of them.
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
        module: Its name, without a dot at its end.
        tensors: Full name → header, or what it holds.
    """

    module: str
    tensors: Mapping[str, TensorInfo | Array]

    def has(self, part: str) -> bool:
        """True where the module has a tensor of this last name."""
        return f"{self.module}.{part}" in self.tensors

    def dtype(self, part: str) -> str:
        """The name of the dtype of a part that is there."""
        return str(self.tensors[f"{self.module}.{part}"].dtype)

    def shape(
        self, part: str, dtypes: Collection[str], *shape: int | None, any_axes: bool = False
    ) -> tuple[int, ...]:
        """The shape of a part.

        Args:
            part: Its last name.
            dtypes: What it may be.
            shape: What its shape has to be; None stands for any size.
            any_axes: Any shape will do.

        Raises:
            LoraFxError: It is missing, empty, or of another dtype or shape.
        """
        sizes = "" if any_axes else f" [{', '.join(str(n or 'any') for n in shape)}]"
        expected = " or ".join(dtypes) + sizes
        if not self.has(part):
            raise self.wrong(part, "is not there", expected)
        found = self.tensors[f"{self.module}.{part}"].shape
        pairs = zip(shape, found, strict=False)
        same = len(shape) == len(found) and all(a in (None, b) for a, b in pairs)
        if self.dtype(part) not in dtypes or not (same or any_axes) or 0 in found:
            raise self.wrong(part, f"is {self.dtype(part)} {list(found)}", expected)
        return found

    def read(self, part: str, rows: slice = ALL, axis: int = 0) -> Array:
        """The content of a part whose header was checked, or a range of it along an axis."""
        tensor = self.tensors[f"{self.module}.{part}"]
        if isinstance(tensor, TensorInfo):
            return stored(tensor, rows, axis)
        return np.asarray(tensor)[(*(ALL,) * axis, rows)] if tensor.ndim else np.asarray(tensor)

    def bytes(self, part: str, low: int, high: int) -> Array:
        """Bytes low ≤ i < high of a part; fewer where it is shorter."""
        tensor = self.tensors[f"{self.module}.{part}"]
        if isinstance(tensor, TensorInfo):
            return stored_bytes(tensor, low, min(high, tensor.stop - tensor.start))
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)[low:high]

    def wrong(self, part: str, found: str, expected: str) -> LoraFxError:
        """The error of a part."""
        return wrong(f"{self.module}.{part}", found, expected)

    def checked(self, q: Quantised, part: str = "weight") -> Quantised:
        """A value that was read, whose parts fit each other; see `checked`."""
        return checked(f"{self.module}.{part}", q)

    def evenly(self, part: str, length: int, groups: int) -> int:
        """How long each of the groups is that an axis is cut in.

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
        """New scales for the blocks that change, and the nearest codes.

        Args:
            names: The parts of codes and of scales, both with rows along their first axes.
            high: Rows that share scales.
            rule: Largest value of a block → its scale as it is stored.
            scale_of: Scales as they are stored → what a step of the codes is worth.
            pack: Codes of some rows → as they are stored.
        """
        codes, scales = (f"{self.module}.{n}" for n in names)

        def recode(q: Quantised, rows: slice, weight: Array, delta: Array) -> Recoded:
            some = packed_range(rows, high)
            stored = q.rescaled(self.read(names[1], some), weight, delta, rule)
            steps = scale_of(stored).reshape(q.scale.shape)
            if not np.isfinite(steps).all():
                bad = int(np.argwhere(~np.isfinite(steps))[0, 0]) * high
                raise LoraFxError(
                    f"tensor {scales!r}: {stored.dtype} cannot hold the scale of row "
                    f"{rows.start + bad}, whose largest value is {np.abs(weight[bad]).max():g}",
                    "the adapter or its scale is broken",
                )
            new = replace(q, scale=steps).nearest(weight, 8)
            first = Written(codes, pack(new.codes), rows.start)
            return new, [first, Written(scales, stored, some.start)]

        return Recoding(recode, (codes, scales), "new")

    def by_stored_scales(
        self,
        part: str,
        bits: int,
        pack: Callable[[Array], Array] = lambda codes: codes,
        axis: int | None = 0,
        place: Callable[[int], int] = lambda row: row,
    ) -> Recoding:
        """The nearest codes by the scales that are there.

        Args:
            part: That of codes.
            bits: Of a code.
            pack: Codes of some rows → as they are stored.
            axis: Which axis of the tensor counts rows; None: its bytes do.
            place: Where a row begins along it.
        """
        name = f"{self.module}.{part}"

        def recode(q: Quantised, rows: slice, weight: Array, delta: Array) -> Recoded:
            new = q.nearest(weight, bits)
            return new, [Written(name, pack(new.in_place()), place(rows.start), axis)]

        return Recoding(recode, (name,))
