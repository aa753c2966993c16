"""Read the header of a safetensors file strictly, without its tensors.

A file is 8 bytes (little-endian length n), n bytes of JSON, then the data:
https://github.com/huggingface/safetensors#format. Everything that a hostile or torn file can get
wrong is refused here, so that who opens a tensor later can trust its range: ranges cover the data
exactly once, and sizes follow from shapes.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_fx.dtypes import DTYPES
from lora_fx.errors import LoraFxError, explained, one_line
from lora_fx.files.read import AGAIN, open_input, refuse_pointer, trusted
from lora_fx.files.strict_json import MAX_JSON, json_object

MAX_DIMS = 64
"""numpy's limit; without one, the product of a hostile shape would never end."""

_BY_CODE = {dtype.code: dtype for dtype in DTYPES.values()}
CONVERT = (
    "convert it to safetensors: safetensors.torch.save_file({k: v.contiguous().clone() for k, v in "
    "state_dict.items()}, 'model.safetensors')"
)
TRUST = f"--trust reads it with torch's unpickler that runs no code; or {CONVERT}"


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor: bytes start ≤ i < stop of `file`; dtype by numpy's name."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    def __getitem__(self, i: int) -> TensorInfo:
        """Entry i along the first axis; an IndexError behind the last, where other bytes lie."""
        size = (self.stop - self.start) // self.shape[0]
        at = self.start + range(self.shape[0])[i] * size
        return replace(self, shape=self.shape[1:], start=at, stop=at + size)


Tensors = Mapping[str, TensorInfo]
"""The places of the tensors of a file or of a whole checkpoint, by name."""


@dataclass(frozen=True)
class Header:
    """One file's header; `data` is the offset of its first data byte."""

    tensors: Tensors
    metadata: Mapping[str, str] = field(default_factory=dict)
    data: int = 0


def read_header(file: str | Path) -> Header:
    """The checked header of one `.safetensors` file, or of a pickle within `trusting`."""
    file = Path(file)
    size, head = _open(file, 64)
    if trusted() and is_pickle(head):
        return _of_pickle(file)
    length = _length(head[:8], size, file)
    _size, data = _open(file, 8 + length)
    return parse_header(data, size, file)


def parse_header(data: bytes, size: int, file: Path) -> Header:
    """The checked header of a file's first bytes.

    All that the safetensors library accepts is accepted, except what no writer makes and what two
    readers could take for two different things: a key that stands twice, fields beside dtype, shape
    and data_offsets, an entry that is no object, sizes from 2^63 up, more than MAX_DIMS axes, more
    than MAX_JSON bytes.

    Args:
        data: The file from its first byte to the end of its header, or further.
        size: The size of the whole file, in bytes.
        file: The file's name, for messages and the result.

    Raises:
        LoraFxError: Anything in the header is wrong; the message names file and tensor.
    """
    refuse_pointer(data, size, file)
    data_start = 8 + _length(data[:8], size, file)
    entries = json_object(data[8:data_start], f"{file}: header", sizes=True)
    metadata = entries.pop("__metadata__", None)
    if metadata is None:  # serde reads null so too
        metadata = {}
    if not _are_texts(metadata):
        raise LoraFxError(f"{file}: __metadata__ is not a map of texts", AGAIN)
    tensors = {name: _entry(file, name, entry, data_start) for name, entry in entries.items()}
    _check_ranges(file, tensors, data_start, size)
    return Header(tensors, metadata, data_start)


def _are_texts(metadata: object) -> bool:
    """True for a map whose values are texts."""
    if not isinstance(metadata, dict):
        return False
    return all(isinstance(value, str) for value in metadata.values())


def first_bytes(path: Path) -> bytes:
    """The first 64 bytes of a file, which tell its kind."""
    _size, head = _open(path, 64)
    return head


def may_be_safetensors(head: bytes) -> bool:
    """True for the first bytes of a file where a header begins behind the length of 8 bytes."""
    return head[8:9] in (b"{", b" ")


def is_pickle(head: bytes) -> bool:
    """True for the first bytes of what torch.save writes; a safetensors file may begin alike."""
    return not may_be_safetensors(head) and head.startswith((b"PK\x03\x04", b"\x80"))


def _of_pickle(file: Path) -> Header:
    """The header of a pickle: its `data` is 0, and each `start` is that of `pickled_places`."""
    from lora_fx.fx.torch_pickles import pickled_places

    tensors = {}
    for name, (dtype, shape, start) in pickled_places(file).items():
        if dtype not in DTYPES:
            raise LoraFxError(f"{file}: tensor {name!r} has dtype {dtype}", CONVERT)
        size = math.prod(shape) * DTYPES[dtype].bits // 8
        tensors[name] = TensorInfo(dtype, shape, file, start, start + size)
    return Header(tensors)


def _length(head: bytes, size: int, file: Path) -> int:
    """The length of the header's JSON in bytes, from the first 8 bytes of the file."""
    length = int.from_bytes(head, "little")
    if size < 8:
        raise LoraFxError(f"{file}: {size} bytes; a safetensors file has at least 8", AGAIN)
    if length > MAX_JSON:
        if head.startswith((b"PK", b"\x80")):  # only now: a header of 128 bytes begins so too
            raise LoraFxError(f"{file}: a PyTorch pickle, not a safetensors file", TRUST)
        raise LoraFxError(
            f"{file}: its header has {length} bytes; expected at most {MAX_JSON}",
            "is this a safetensors file?",
        )
    if 8 + length > size:
        raise LoraFxError(f"{file}: {size} bytes, but its header alone needs {8 + length}", AGAIN)
    return length


def _open(file: Path, count: int) -> tuple[int, bytes]:
    """The size of a file and its first `count` bytes.

    Raises:
        LoraFxError: It cannot be read, or is a git-LFS pointer.
    """
    with open_input(file) as opened, explained(file):
        size = os.fstat(opened.fileno()).st_size
        head = opened.read(max(count, 64))
    refuse_pointer(head, size, file)
    return size, head[:count]


def _entry(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    """The place of a tensor from its header entry; the offsets count from `data_start`."""
    if not isinstance(entry, dict):
        raise _wrong(file, name, f"has {entry!r}", "expected dtype, shape and data_offsets")
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _wrong(file, name, f"has {sorted(entry)}", "expected dtype, shape and data_offsets")

    code = entry["dtype"]
    if not isinstance(code, str) or code not in _BY_CODE:
        raise _wrong(
            file, name, f"dtype {code!r} is unknown", f"expected one of {', '.join(_BY_CODE)}"
        )
    shape = entry["shape"]
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise _wrong(file, name, f"shape {shape!r}", f"expected at most {MAX_DIMS} sizes from 0 up")
    offsets = entry["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _wrong(file, name, f"data_offsets {offsets!r}", "expected [start, stop]")
    if 0 in shape and max(itertools.accumulate(shape, operator.mul)) >= 1 << 64:
        expected = "expected sizes whose product, in order, stays below 2^64"
        raise _wrong(file, name, f"shape {shape}", expected)

    dtype = _BY_CODE[code]
    start, stop = offsets
    bits = math.prod(shape) * dtype.bits
    if bits != 8 * (stop - start):
        needed_bytes = one_line(-(-bits // 8), 40)
        needed = f"{code} {one_line(shape, 120)} needs {needed_bytes}"
        raise _wrong(file, name, f"its range holds {stop - start} bytes", needed)
    return TensorInfo(dtype.name, tuple(shape), file, data_start + start, data_start + stop)


def _wrong(file: Path, name: str, found: str, expected: str) -> LoraFxError:
    """The error of a tensor's entry: what it has, and what was expected."""
    tensor = one_line(repr(name), 120)
    return LoraFxError(f"{file}: tensor {tensor}: {one_line(found, 120)}; {expected}", AGAIN)


def _are_sizes(value: object) -> bool:
    """True for a list of whole numbers from 0 up to 2^63 − 1."""
    if not isinstance(value, list):
        return False
    return all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_ranges(file: Path, tensors: Tensors, data_start: int, size: int) -> None:
    """Raise unless the ranges cover the data exactly once."""
    reached = data_start
    previous = "the header"
    in_order = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    for name, tensor in in_order:
        if tensor.start != reached:
            problem = "overlaps" if tensor.start < reached else "leaves a hole after"
            raise LoraFxError(
                f"{file}: tensor {one_line(repr(name), 120)} {problem} {one_line(previous, 120)}: "
                f"it starts at byte {tensor.start}, expected {reached}",
                AGAIN,
            )
        reached = tensor.stop
        previous = f"tensor {name!r}"
    if reached != size:
        problem = "it is cut off" if size < reached else "bytes that belong to no tensor follow"
        raise LoraFxError(
            f"{file}: {size} bytes, but its tensors end at {reached}: {problem}", AGAIN
        )
