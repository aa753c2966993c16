"""What every format of quantised weights needs: parts by name, and checks that name them.

A format is a function of the parts of one weight. It checks their headers, says the format, the
bits and the shape of the weight, and hands back a `QuantisedWeight`, whose `read` then reads the
parts themselves. Live modules and tests give arrays: `parts_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.safetensors import TensorInfo, finite
from lora_fx.ir.quantised import Quantised, blocks_in

DAMAGED = "the file is damaged, or its quantiser wrote a layout that lora-fx does not know"
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
"""dtypes whose elements are codes and numbers at once."""


@dataclass(frozen=True)
class QuantisedWeight:
    """A quantised weight that lies in a checkpoint.

    Attributes:
        format: Its format, for people.
        bits: Of a code; 0 where that is not known.
        shape: Of the weight, as its model has it; empty where that is not known.
        read: Reads it.
    """

    format: str
    bits: int
    shape: tuple[int, ...]
    read: Callable[[], Quantised]


@dataclass(frozen=True)
class Parts:
    """The tensors of a checkpoint, seen from one module.

    Attributes:
        module: Its name, without a dot at its end.
        tensors: Full name → header.
        array: Full name → content.
    """

    module: str
    tensors: Mapping[str, TensorInfo | Array]
    array: Callable[[str], Array]

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

    def read(self, part: str) -> Array:
        """The content of a part whose header was checked."""
        return self.array(f"{self.module}.{part}")

    def wrong(self, part: str, found: str, expected: str) -> LoraFxError:
        """The error of a part."""
        return wrong(f"{self.module}.{part}", found, expected)


def parts_of(module: str, arrays: Mapping[str, Array]) -> Parts:
    """Arrays by their last names as the parts of a module."""
    full = {f"{module}.{name}": array for name, array in arrays.items()}
    return Parts(module, full, full.__getitem__)


def wrong(where: str, found: str, expected: str, hint: str = DAMAGED) -> LoraFxError:
    """The error of a tensor: what was found in it, and what was expected."""
    return LoraFxError(f"tensor {one_line(repr(where), 160)} {found}; expected {expected}", hint)


def shaped(where: str, what: str, array: Array, shape: tuple[int, ...]) -> Array:
    """An array in its shape, which may be flattened.

    Raises:
        LoraFxError: It has another shape.
    """
    if array.shape != shape and (array.ndim > 1 or array.size != math.prod(shape)):
        raise wrong(where, f"has {what} {array.dtype} {list(array.shape)}", f"{list(shape)}")
    return array.reshape(shape)


def checked(where: str, q: Quantised) -> Quantised:
    """The value, whose parts fit each other; scales and zero points may be flattened before.

    Args:
        where: The name of the weight, for messages.
        q: What was read.

    Raises:
        LoraFxError: Blocks, scales, zeros or codes that cannot be those of one weight.
    """
    if 0 in q.shape or not q.shape:
        raise wrong(where, f"has codes {list(q.shape)}", "the codes of a weight")
    if len(q.block) not in (1, len(q.shape)) or min(q.block) < 1:
        raise wrong(where, f"has blocks of {list(q.block)}", "a size from 1 up an axis, or one")
    if q.scale.dtype.kind in "iub":
        raise wrong(where, f"has scales of {q.scale.dtype}", "floats")
    blocks = blocks_in(q.shape, q.block)
    scale = shaped(where, "scales", q.scale, blocks)
    zero = None if q.zero is None else shaped(where, "zero points", q.zero, blocks)
    for what, part in (("scale", scale), ("zero point", zero), ("code", q.codes)):
        if part is not None and part.dtype.kind not in "iub" and not finite(part):
            raise wrong(where, f"has a {what} that is no number", "finite numbers")
    if q.levels is not None and (not finite(q.levels) or q.codes.max() >= len(q.levels)):
        raise wrong(where, f"has codes up to {q.codes.max()}", f"{len(q.levels)} finite levels")
    return replace(q, scale=scale, zero=zero if zero is None or zero.any() else None)


def grouped(codes: Array, scale: Array, zero: Array | None, groups: Array) -> Quantised:
    """A matrix of codes [out, in] by the group of each column: neighbours, once these are sorted.

    Where groups are of several sizes each column has its own scale.
    """
    order, block = np.argsort(groups, kind="stable"), int(np.count_nonzero(groups == 0)) or 1
    even = np.array_equal(groups[order], np.arange(len(groups)) // block)
    if not even or -(-len(groups) // block) != scale.shape[1]:
        zero = None if zero is None else zero[:, groups]
        return Quantised(codes, scale[:, groups], zero, (1, 1))
    moved = None if np.array_equal(groups, groups[order]) else order
    codes = np.ascontiguousarray(codes[:, order])
    return Quantised(codes, scale, zero, (1, block), order=moved)


def below(where: str, parts: Sequence[Quantised]) -> Quantised:
    """Matrices below each other as one.

    Args:
        where: The name of the whole, for messages.
        parts: Of one format.

    Raises:
        LoraFxError: Their blocks are not alike, or do not end with them, or columns are moved.
    """
    first, zero = parts[0], None
    alike = all(q.block == first.block and q.shape == first.shape for q in parts)
    whole = not first.flat or first.codes.size % first.block[0] == 0
    if not (alike and whole) or any(q.order is not None for q in parts):
        raise wrong(where, "has matrices in blocks that differ", "blocks of one kind, none moved")
    if any(q.zero is not None for q in parts):
        zero = np.concatenate([np.zeros_like(q.scale) if q.zero is None else q.zero for q in parts])
    codes, scale = (np.concatenate([getattr(q, n) for q in parts]) for n in ("codes", "scale"))
    return replace(first, codes=codes, scale=scale, zero=zero)


def bits_of(length: int, words: int) -> int:
    """How many bits `length` codes have that lie in `words` words of 32; 0 where none would do.

    >>> bits_of(128, 16), bits_of(100, 10), bits_of(128, 17)
    (4, 3, 0)
    """
    fits = [b for b in range(2, 9) if -(-length * b // 32) == words]
    return fits[0] if len(fits) == 1 else 0


def evenly(parts: Parts, part: str, length: int, groups: int) -> int:
    """How long each of the groups is that an axis is cut in.

    Raises:
        LoraFxError: They are not of one length.
    """
    if length % groups:
        raise parts.wrong(part, f"has {groups} groups", f"a number that divides {length} inputs")
    return length // groups
