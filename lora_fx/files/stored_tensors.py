"""Reading of a file's tensors or of parts of them, without memory mapping."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.copying import read_into
from lora_fx.files.read import AGAIN, open_input
from lora_fx.files.safetensors import TensorInfo

CHUNK = 1 << 20
"""The number of bytes that are compared at once."""


def stored_bytes(info: TensorInfo, lo: int, hi: int) -> Array:
    """Read bytes lo ≤ i < hi of a tensor.

    Raises:
        LoraFxError: The file ends before them, or cannot be read.
    """
    return stored(replace(info, dtype="uint8", shape=(info.stop - info.start,)), slice(lo, hi))


def stored(info: TensorInfo, part: slice = slice(None), axis: int = 0) -> Array:
    """Read a tensor, or a part of it along one axis.

    Raises:
        LoraFxError: The file ends before it, or cannot be read.
    """
    dtype = numpy_dtype(info.dtype)
    shape = info.shape or (1,)
    start, stop, _ = part.indices(shape[axis])
    length = stop - start
    outer = shape[:axis]
    inner = shape[axis + 1 :]

    # one run of bytes for every place along the axes before this one
    stride = math.prod(inner) * dtype.itemsize
    runs = np.empty((math.prod(outer), length * stride), np.uint8)
    with reading(info), open_input(info.file) as file:
        for place, run in enumerate(runs):
            offset = (place * shape[axis] + start) * stride
            read_into(file.fileno(), run.data, info.start + offset)
    if not info.shape:
        return runs.view(dtype).reshape(())
    return runs.view(dtype).reshape(*outer, length, *inner)


def stored_elements(info: TensorInfo, lo: int, hi: int) -> Array:
    """Read elements lo ≤ i < hi of a tensor in its stored dtype."""
    dtype = numpy_dtype(info.dtype)
    return stored_bytes(info, lo * dtype.itemsize, hi * dtype.itemsize).view(dtype)


def same_bytes(a: TensorInfo | Array, b: TensorInfo | Array) -> bool:
    """Whether two tensors, stored or arrays, have one dtype and shape and the same bytes.

    Reading stops at the first block that differs: either may be larger than memory.

    Raises:
        LoraFxError: A file ends inside its tensor, or cannot be read.
    """
    if (str(a.dtype), a.shape) != (str(b.dtype), b.shape):
        return False
    if (
        isinstance(a, TensorInfo)
        and isinstance(b, TensorInfo)
        and a.start == b.start
        and os.path.samefile(a.file, b.file)
    ):
        return True
    blocks = zip(_blocks(a), _blocks(b), strict=True)
    return all(block_a == block_b for block_a, block_b in blocks)


def _blocks(tensor: TensorInfo | Array) -> Iterator[bytearray]:
    """Yield the bytes of a tensor, CHUNK at a time.

    Always in the same buffer, since new ones would cost page faults; behind the last, shorter block
    are still bytes of the one before. A bytearray, because comparing two of them took a sixth of
    the time of np.array_equal.
    """
    block = bytearray(CHUNK)
    if isinstance(tensor, TensorInfo):
        with reading(tensor), open_input(tensor.file) as file:
            for lo in range(tensor.start, tensor.stop, CHUNK):
                read_into(file.fileno(), memoryview(block)[: tensor.stop - lo], lo)
                yield block
    else:
        flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        for lo in range(0, len(flat), CHUNK):
            chunk = flat[lo : lo + CHUNK]
            block[: len(chunk)] = chunk.data
            yield block


@contextlib.contextmanager
def reading(info: TensorInfo) -> Iterator[None]:
    """A block whose OSErrors become LoraFxErrors that name the tensor's file."""
    try:
        yield
    except OSError as error:
        why = "ends inside a tensor while it is read"
        if error.strerror:
            why = f"cannot be read: {error.strerror}"
        raise LoraFxError(f"{info.file}: {why}", AGAIN) from error
