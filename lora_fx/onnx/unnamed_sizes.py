"""Sizes that a Reshape leaves to a −1, written out, so that its input can be flattened.

    Reshape(x [b, s, 24], [b, s, -1, 12]) → Reshape(x', [b, s, 2, 12])        x' [b·s, 24]

Of an empty batch the runtime tells a −1 by the sizes of the input that are not 0 (1.31). Of flat
rows these are fewer: it refuses [0, s, -1, 12], and makes [0, 1, 2, 12] of [0, -1, 2, 12]. A target
of numbers alone is as it was: its −1 follows from the number of elements. Where a file does not
tell the size, the flat rows get the shape of the layer's result back first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.emitter import OnnxEmitter
from lora_fx.onnx.graph.values import constant, made_by, shape_of


@dataclass(frozen=True)
class UnnamedSize:
    """A −1 in a target that is joined of parts, of which some are computed.

    Attributes:
        concat: The node that joins the target.
        slot: The part with the −1, a constant.
        place: Its place in that part.
        size: The size as the result has it: a number, or the text of a symbol; None where the file
            does not tell.
    """

    concat: ir.Node
    slot: int
    place: int
    size: int | str | None

    def is_known_of(self, x: ir.Value) -> bool:
        """Whether the size is a number, or that of an axis of x."""
        return isinstance(self.size, int) or self.axis_of(x) is not None

    def axis_of(self, x: ir.Value) -> int | None:
        """Return the axis of x that has the size; None if there is none."""
        if self.size is None:
            return None
        sizes = [str(size) for size in shape_of(x) or ()]
        return sizes.index(str(self.size)) if str(self.size) in sizes else None

    @property
    def part(self) -> ir.Value:
        """The part of the target with the −1."""
        part = self.concat.inputs[self.slot]
        assert part is not None
        return part


class TargetEmitter(OnnxEmitter):
    """The emitter of the nodes of targets without a −1."""

    def target(self, unnamed: UnnamedSize, x: ir.Value) -> ir.Value:
        """Return a target with the size in the place of its −1.

        Args:
            unnamed: The −1.
            x: The value whose axis has that size, where it is no number.
        """
        sizes = constant(unnamed.part)
        assert sizes is not None
        before = [int(size) for size in sizes[: unnamed.place]]
        behind = [int(size) for size in sizes[unnamed.place + 1 :]]
        parts = list(unnamed.concat.inputs)
        parts[unnamed.slot : unnamed.slot + 1] = self._named(before, unnamed, behind, x)
        return self.call("Concat", *parts, axis=0)

    def sizes_of_layer(self, x: ir.Value, width: int) -> ir.Value:
        """Return the sizes of x with another last one, as a target."""
        sizes = self.call("Slice", self.call("Shape", x), self._ints(0), self._ints(-1))
        return self.call("Concat", sizes, self._ints(width), axis=0)

    def _named(
        self, before: list[int], unnamed: UnnamedSize, behind: list[int], x: ir.Value
    ) -> list[ir.Value]:
        """Return the part with the −1 as one or more, between the numbers before and behind it."""
        if isinstance(unnamed.size, int):
            return [self._ints(*before, unnamed.size, *behind)]
        axis = unnamed.axis_of(x)
        assert axis is not None
        parts = [self.call("Gather", self.call("Shape", x), self._ints(axis))]
        if before:
            parts.insert(0, self._ints(*before))
        if behind:
            parts.append(self._ints(*behind))
        return parts


def unnamed_size(reshape: ir.Node) -> UnnamedSize | None:
    """Return the −1 beside computed sizes in the target of a Reshape; None if there is none."""
    concat = made_by(reshape.inputs[1], "Concat")
    if concat is None:
        return None
    axis: int | None = 0
    for slot, part in enumerate(concat.inputs):
        sizes = constant(part)
        if sizes is not None and -1 in sizes:
            place = int(np.flatnonzero(sizes == -1)[0])
            axis_of_result = None if axis is None else axis + place
            size = _size_at(reshape.outputs[0], axis_of_result)
            return UnnamedSize(concat, slot, place, size)
        count = _length(part)
        axis = None if axis is None or count is None else axis + count
    return None


def _length(part: ir.Value | None) -> int | None:
    """Return the number of sizes in a part of a target; None if the file does not tell."""
    sizes = constant(part)
    if sizes is not None:
        return int(sizes.size)
    shape = shape_of(part)
    if shape is None or len(shape) != 1 or not isinstance(shape[0], int):
        return None
    return shape[0]


def _size_at(value: ir.Value, axis: int | None) -> int | str | None:
    """Return a size of a value, a number or the text of a symbol; None if it is unknown."""
    shape = shape_of(value)
    if shape is None or axis is None or axis >= len(shape):
        return None
    size = shape[axis]
    if isinstance(size, int):
        return size
    symbol = str(size)
    return None if symbol == "None" else symbol
