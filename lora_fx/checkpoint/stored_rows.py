"""Readers of a stored tensor's rows, with memory that a thread reuses."""

from __future__ import annotations

import math

import numpy as np

from lora_fx.dtypes import Array, NumpyDtype, numpy_dtype
from lora_fx.files.copying import read_into
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.read import open_input
from lora_fx.files.safetensors import TensorInfo


class Space:
    """Arrays that a thread reuses for every block, because allocation causes page faults."""

    def __init__(self) -> None:
        self._bytes: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: NumpyDtype) -> Array:
        """Return an uninitialised array; the next array with this name reuses its memory."""
        size = math.prod(shape) * dtype.itemsize
        buffer = self._bytes.get(name)
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
            self._bytes[name] = buffer
        return buffer[:size].view(dtype).reshape(shape)


def read_rows(
    fd: int, info: TensorInfo, low: int, high: int, columns: int, space: Space | None = None
) -> Array:
    """Read rows low ≤ i < high of a stored tensor, seen as rows of `columns` columns.

    Args:
        fd: Its file, opened.
        info: Where it lies.
        low: The first row.
        high: The row behind the last.
        columns: Elements of a row.
        space: The calling thread's, in which the result then lies.
    """
    if isinstance(info, CodesInfo):
        return info.weight.rows(low, high)
    space = space or Space()
    rows = space.array("old", (high - low, columns), numpy_dtype(info.dtype))
    row_bytes = rows.itemsize * columns
    try:
        read_into(fd, rows.view(np.uint8).reshape(-1).data, info.start + low * row_bytes)
    except OSError as error:  # says which file, as a descriptor cannot
        error.filename = str(info.file)
        raise
    return rows


def read_block(info: TensorInfo, low: int, high: int, columns: int) -> Array:
    """Open the file of a stored tensor and read rows low ≤ i < high, as `read_rows` does."""
    with open_input(info.file) as file:
        return read_rows(file.fileno(), info, low, high, columns)
