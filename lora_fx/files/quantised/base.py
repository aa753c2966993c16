"""What every format of quantised weights needs: parts by name, and checks that name them.

A format is a function of the parts of one weight. It checks their headers, says the format, the
bits and the shape of the weight, and hands back a `QuantisedWeight`, whose `read` then reads the
parts themselves, or what some rows of the weight need of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.stored_tensors import stored, stored_bytes
from lora_fx.files.tensor_files import finite
from lora_fx.ir.quantised import Quantised, blocks_in

DAMAGED = "the file is damaged, or its quantiser wrote a layout that lora-fx does not know"
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
"""dtypes whose elements are codes and numbers at once."""
ALL = slice(None)


class Read(Protocol):
    """Reads rows of a weight, the first and the last of them at a multiple of its `step`."""

    def __call__(self, rows: slice = ALL) -> Quantised:
        """The value of these rows."""


@dataclass(frozen=True)
class Written:
    """New content of a range of a tensor.

    Attributes:
        name: The tensor.
        data: What it holds there.
        low: Where the range begins along the axis.
        axis: Which; None: the bytes of the tensor.
        matrix: Which matrix of a stack has the range; None for what is no stack.
    """

    name: str
    data: Array
    low: int
    axis: int | None = 0
    matrix: int | None = None


Recoded = tuple[Quantised, list[Written]]
Recode = Callable[[Quantised, slice, Array, Array], Recoded]
"""Quantises rows that were read anew: what is stored then, and where.

It is given the rows as they were, which rows, as `read` takes them, their new values in fp32, and
how much of them is new.
"""


class Recoding(NamedTuple):
    """How a weight is quantised anew.

    Attributes:
        recode: Quantises rows anew.
        recoded: The tensors that it writes, the codes first.
        scales: Whether it makes new scales, or rounds to the nearest by those that are stored.
    """

    recode: Recode
    recoded: tuple[str, ...]
    scales: Literal["stored", "new"] = "stored"


@dataclass(frozen=True)
class QuantisedWeight:
    """A quantised weight that lies in a checkpoint.

    Attributes:
        format: Its format, for people.
        bits: Of a code; 0 where that is not known.
        shape: Of the weight, as its model has it; empty where that is not known.
        read: Reads it, or some of its rows: those of [∏ shape[:-1], shape[-1]], and of a stack
            those of one of its matrices.
        step: Rows can be read from each multiple of this on.
        anew: How it is quantised anew; None where that is not done.
    """

    format: str
    bits: int
    shape: tuple[int, ...]
    read: Read
    step: int = 1
    anew: Recoding | None = None

    def rows(self, low: int, high: int) -> Array:
        """Rows low ≤ i < high of the weight, as `read` counts them, in fp32."""
        return self.window(low, high)(low, high)

    def window(self, low: int, high: int) -> Callable[[int, int], Array]:
        """What gives rows within low ≤ i < high, in fp32; their codes are read at once."""
        matrix, pieces = math.prod(self.shape[-2:-1]), []
        while low < high:
            first = low - low % matrix  # of its matrix in a stack
            start = low - (low - first) % self.step
            end = min(high, first + matrix)
            stop = min(first + matrix, start + -(-(end - start) // self.step) * self.step)
            pieces.append((start, low, end, self.read(slice(start, stop))))
            low = end

        def rows(low: int, high: int) -> Array:
            found = [
                q.dequantise(rows=slice(max(low, first) - start, min(high, end) - start))
                for start, first, end, q in pieces
                if first < high and low < end
            ]
            return found[0] if len(found) == 1 else np.concatenate(found)

        return rows

    def spans(self, most: int, low: int = 0, high: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of about `most` rows that can be quantised for themselves, in one matrix each."""
        matrix = self.shape[-2]
        high = math.prod(self.shape[:-1]) if high is None else high
        each = max(self.step, most // self.step * self.step)
        while low < high:
            stop = min(high, low - low % matrix + matrix, low + each)
            yield low, stop
            low = stop


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


def wrong(where: str, found: str, expected: str, hint: str = DAMAGED) -> LoraFxError:
    """The error of a tensor: what was found in it, and what was expected."""
    return LoraFxError(f"tensor {one_line(repr(where), 160)} {found}; expected {expected}", hint)


def packed_range(rows: slice, codes: int, words: int = 1) -> slice:
    """Where the codes of rows lie, `codes` of them in `words` words.

    >>> packed_range(slice(8, 20), 8), packed_range(slice(32, 64), 32, 3), packed_range(ALL, 8)
    (slice(1, 3, None), slice(3, 6, None), slice(None, None, None))
    """
    if rows == ALL:
        return ALL
    return slice(rows.start // codes * words, -(-rows.stop // codes) * words)


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
    codes = np.ascontiguousarray(codes if moved is None else codes[:, order])
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
