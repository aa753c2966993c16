"""Strict reading of safetensors files into numpy arrays, and reproducible writing.

The header is written here rather than by `safetensors.numpy.save`, which (0.8.0) writes the bytes
of a transposed array in the wrong order and puts metadata in an order that changes from run to
run. bfloat16 goes through ml_dtypes. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lora_fx.dtypes import DTYPES, FLOATING, Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.adapter_formats import adapter_files
from lora_fx.files.permissions import keep_mode
from lora_fx.files.read import open_input, trusted
from lora_fx.files.safetensors import TRUST, first_bytes, is_pickle, may_be_safetensors, read_header
from lora_fx.files.stored_tensors import stored
from lora_fx.text import Json

_PLAIN = (*reversed(FLOATING), "int64", "int32", "int16", "int8", "uint8", "bool")
"""The dtypes that adapters are stored in."""
_FLOATS = frozenset(map(numpy_dtype, FLOATING))
_CODES = {numpy_dtype(name): DTYPES[name].code for name in _PLAIN}


def is_float(array: Array) -> bool:
    """Whether the array has one of the four float dtypes that adapters are stored in."""
    return array.dtype in _FLOATS


def write_tensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file and sync it to disk. Equal inputs give equal bytes.

    Args:
        path: File to create; an existing one is overwritten.
        tensors: Arrays of any shape and memory order.
        metadata: Texts for the header.

    Raises:
        LoraFxError: A dtype that the format or this project does not store.
    """
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: Json = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        array = tensors[name]
        code = _CODES.get(array.dtype)
        if code is None:
            raise LoraFxError(
                f"tensor {name!r} has dtype {array.dtype}", f"cast it to one of {', '.join(_PLAIN)}"
            )
        offsets = [offset, offset + array.nbytes]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": offsets}
        offset += array.nbytes
    with open(path, "wb") as file:
        _write_header(file, header)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).tobytes())
        file.flush()
        os.fsync(file.fileno())


def copy_with_text(source: Path, target: Path, name: str, text: str) -> None:
    """Copy a safetensors file, with one more text in its header.

    Args:
        source: The file.
        target: A new name within what `replacing` makes.
        name: The field of the header's metadata; one of that name is replaced.
        text: Its value.
    """
    header = read_header(source)
    with open_input(source) as original, target.open("xb") as copy:
        keep_mode(os.fstat(original.fileno()), target)
        data = json.loads(original.read(header.data)[8:])
        data["__metadata__"] = dict(sorted({**header.metadata, name: text}.items()))
        _write_header(copy, data)
        shutil.copyfileobj(original, copy)


def _write_header(file: BinaryIO, header: Json) -> None:
    """Write the header of a safetensors file."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Read all tensors of a safetensors file in file order, and the texts of its header.

    Within `trusting`, those of a pickle too.

    Raises:
        LoraFxError: It is no safetensors file, or damaged; the message says what it is instead.
    """
    refuse_other_kinds(path)
    if is_pickle(first_bytes(path)):
        from lora_fx.fx.torch_pickles import read_pickle

        return read_pickle(path), {}
    header = read_header(path)
    for name, info in header.tensors.items():
        if info.dtype not in _PLAIN:
            raise LoraFxError(
                f"{path}: tensor {name!r} has dtype {DTYPES[info.dtype].code}; expected "
                f"{', '.join(_PLAIN)}",
                "save the adapter in a float dtype; quantised adapters are not supported",
            )
    return {name: stored(info) for name, info in header.tensors.items()}, dict(header.metadata)


def refuse_other_kinds(path: Path) -> None:
    """Raise for a file of another kind, told by its first bytes, with a matching hint."""
    head = first_bytes(path)
    # First, because the length of a header may begin with any byte, a pickle's included.
    if may_be_safetensors(head) or (trusted() and is_pickle(head)):
        return
    if is_pickle(head):
        raise LoraFxError(f"{path}: a pickle, which can run any code; expected safetensors", TRUST)
    endings = ".safetensors"
    adapters = adapter_files()
    if adapters is not None:
        ending = adapters.ending_by_magic(head)
        if ending:
            raise LoraFxError(
                f"{path}: this is a {ending} file, which cannot be read here",
                "use the safetensors adapter that it was made from",
            )
        endings = ", ".join(adapters.suffixes())
    raise LoraFxError(
        f"{path}: not a safetensors file",
        f"adapters are read from {endings} files, and from folders of them",
    )


@np.errstate(invalid="ignore")  # ml_dtypes says it of NaN that signal
def finite(array: Array) -> bool:
    """Whether every element is finite; exact in any float dtype."""
    return bool(np.isfinite(array).all())
