"""One safetensors file, read strictly and without reading its tensors.

A file is 8 bytes (little-endian length n), n bytes of JSON, then the data:
https://github.com/huggingface/safetensors#format. Everything that a hostile or torn file can get
wrong is refused here, so that who opens a tensor later can trust its range: ranges cover the data
exactly once, and sizes follow from shapes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_fx.errors import LoraFxError, one_line

MAX_HEADER = 32 << 20
"""Largest header or index, in bytes; Python's json takes about 12 times that in memory."""

MAX_DIMS = 64
"""numpy's limit; without one, the product of a hostile shape would never end."""

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 8), "U8": ("uint8", 8), "I8": ("int8", 8), "U16": ("uint16", 16),
    "I16": ("int16", 16), "U32": ("uint32", 32), "I32": ("int32", 32), "U64": ("uint64", 64),
    "I64": ("int64", 64), "F16": ("float16", 16), "BF16": ("bfloat16", 16),
    "F32": ("float32", 32), "F64": ("float64", 64), "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8), "F4": ("float4_e2m1fn", 4),
    "F6_E2M3": ("float6_e2m3fn", 6), "F6_E3M2": ("float6_e3m2fn", 6),
}  # fmt: skip
"""The format's name of a dtype → numpy's (or ml_dtypes') name and its bits."""

CONVERT = "convert it to safetensors: safetensors.torch.save_file(state_dict, 'model.safetensors')"
AGAIN = "the file is damaged or cut off: download or write it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes start ≤ i < stop of `file`; dtype by numpy's name."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """One file's header; `data` is the offset of its first data byte."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    data: int = 0


def read_header(file: str | Path) -> Header:
    """The checked header of one `.safetensors` file."""
    file = Path(file)
    size, head = _open(file, 8)
    n = int.from_bytes(head, "little")
    if size < 8:
        raise LoraFxError(f"{file}: {size} bytes; a safetensors file has at least 8", AGAIN)
    if n > MAX_HEADER:
        if head.startswith((b"PK", b"\x80")):  # only now: a header of 128 bytes begins so too
            raise LoraFxError(f"{file}: a PyTorch pickle, not a safetensors file", CONVERT)
        raise LoraFxError(
            f"{file}: its header would be {n} bytes; at most {MAX_HEADER} are read",
            "is this a safetensors file?",
        )
    if 8 + n > size:
        raise LoraFxError(f"{file}: {size} bytes, but its header alone needs {8 + n}", AGAIN)
    _, text = _open(file, n, 8)
    entries = _parse(file, text, "header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise LoraFxError(f"{file}: __metadata__ is not a map of texts", AGAIN)
    found = {name: _entry(file, name, entry, 8 + n) for name, entry in entries.items()}
    _covered(file, found, 8 + n, size)
    return Header(found, metadata, 8 + n)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of at most MAX_HEADER bytes; twice the same key is refused."""
    size, text = _open(file, MAX_HEADER)
    if size > MAX_HEADER:
        raise LoraFxError(f"{file}: {size} bytes; at most {MAX_HEADER} are read")
    return _parse(file, text, "file")


def _open(file: Path, count: int, skip: int = 0) -> tuple[int, bytes]:
    """Size of a file and `count` of its bytes; a git-LFS pointer is named as such."""
    if file.is_dir() or (file.exists() and not file.is_file()):
        raise LoraFxError(f"{file}: not a regular file", "give a .safetensors file")
    try:
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            if f.read(42).startswith(b"version https://git-lfs.github.com/spec/"):
                raise LoraFxError(
                    f"{file}: a git-LFS pointer ({size} bytes), not the file it stands for",
                    f"fetch the real files: git -C {file.parent} lfs pull",
                )
            f.seek(skip)
            return size, f.read(count)
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise LoraFxError(f"{file}: cannot be read: {why}", "is the path right?") from e


def _parse(file: Path, text: bytes, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ValueError(f"key {twice!r} is there twice")
        return result

    def number(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=number)
    except (ValueError, RecursionError) as e:
        raise LoraFxError(f"{file}: its {what} is not valid JSON: {one_line(e, 120)}", AGAIN) from e
    if not isinstance(value, dict):
        raise LoraFxError(f"{file}: its {what} is a JSON {type(value).__name__}, not an object")
    return value


def _entry(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    def bad(found: object, expected: str) -> LoraFxError:
        where = one_line(repr(name), 120)
        return LoraFxError(f"{file}: tensor {where}: {one_line(found, 120)}; {expected}", AGAIN)

    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise bad(
            f"has {sorted(entry) if isinstance(entry, dict) else entry!r}",
            "expected dtype, shape and data_offsets",
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise bad(f"dtype {entry['dtype']!r} is unknown", f"expected one of {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or len(shape) > MAX_DIMS:
        raise bad(f"shape {shape!r}", f"expected at most {MAX_DIMS} sizes from 0 up")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets {offsets!r}", "expected [start, stop]")
    bits, length = math.prod(shape) * dtype[1], offsets[1] - offsets[0]
    if bits != 8 * length:
        raise bad(
            f"its range holds {length} bytes",
            f"{entry['dtype']} {shape} needs {math.ceil(bits / 8)}",
        )
    return TensorInfo(dtype[0], tuple(shape), file, data + offsets[0], data + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _covered(file: Path, found: Mapping[str, TensorInfo], data: int, size: int) -> None:
    """Raise unless the ranges cover the data exactly once."""
    reached, last = data, "the header"
    for name, t in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if t.start != reached:
            what = "overlaps" if t.start < reached else "leaves a hole after"
            raise LoraFxError(
                f"{file}: tensor {one_line(repr(name), 120)} {what} {one_line(last, 120)}: "
                f"it starts at byte {t.start}, expected {reached}",
                AGAIN,
            )
        reached, last = t.stop, f"tensor {name!r}"
    if reached != size:
        what = "it is cut off" if size < reached else "bytes that belong to no tensor follow"
        raise LoraFxError(f"{file}: {size} bytes, but its tensors end at {reached}: {what}", AGAIN)
