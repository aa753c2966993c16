"""Checks that the parts of a quantised weight fit each other, and errors that name them."""

from __future__ import annotations

import math
from dataclasses import replace

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.tensor_files import finite
from lora_fx.ir.quantised import Quantised, blocks_in

DAMAGED = "the file is damaged, or its quantiser wrote a layout that lora-fx does not know"


def wrong(where: str, found: str, expected: str, hint: str = DAMAGED) -> LoraFxError:
    """The error of a tensor: what is wrong with it, and what was expected.

    Args:
        where: The tensor's name.
        found: What is wrong, as the rest of a sentence whose subject is the tensor.
        expected: What it should be.
        hint: What to do about it.
    """
    return LoraFxError(f"tensor {one_line(repr(where), 160)} {found}; expected {expected}", hint)


def shaped(where: str, what: str, array: Array, shape: tuple[int, ...]) -> Array:
    """An array in the shape that it should have; it may be flattened before.

    Args:
        where: The weight's name, for messages.
        what: What the array holds.
        array: The array.
        shape: The shape that it should have.

    Raises:
        LoraFxError: It has another shape.
    """
    if array.shape != shape and (array.ndim > 1 or array.size != math.prod(shape)):
        raise wrong(where, f"has {what} {array.dtype} {list(array.shape)}", f"{list(shape)}")
    return array.reshape(shape)


def checked(where: str, q: Quantised) -> Quantised:
    """A weight as it was read, with scales and zero points in their shape.

    They may be flattened before. Zero points that are all 0 are left out.

    Args:
        where: The name of the weight, for messages.
        q: The weight.

    Raises:
        LoraFxError: Blocks, scales, zeros or codes that do not fit each other.
    """
    if 0 in q.shape or not q.shape:
        raise wrong(where, f"has codes {list(q.shape)}", "the codes of a weight")
    if len(q.block) not in (1, len(q.shape)) or min(q.block) < 1:
        raise wrong(
            where,
            f"has blocks of {list(q.block)}",
            "one size of 1 or more for each axis, or one for all",
        )
    if q.scale.dtype.kind in "iub":
        raise wrong(where, f"has scales of {q.scale.dtype}", "floats")
    blocks = blocks_in(q.shape, q.block)
    scale = shaped(where, "scales", q.scale, blocks)
    zero = None if q.zero is None else shaped(where, "zero points", q.zero, blocks)
    for what, array in (("scale", scale), ("zero point", zero), ("code", q.codes)):
        if array is not None and array.dtype.kind not in "iub" and not finite(array):
            raise wrong(where, f"has a {what} that is not finite", "finite numbers")
    if q.levels is not None and (not finite(q.levels) or q.codes.max() >= len(q.levels)):
        raise wrong(where, f"has codes up to {q.codes.max()}", f"{len(q.levels)} finite levels")

    if zero is not None and not zero.any():
        zero = None
    return replace(q, scale=scale, zero=zero)
