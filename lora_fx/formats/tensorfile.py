"""safetensors files as numpy arrays: strict reading, and writing with reproducible bytes.

The header is written here rather than by `safetensors.numpy.save`, which (0.8.0) writes the bytes
of a transposed array in the wrong order and puts metadata in an order that changes from run to
run. bfloat16 goes through ml_dtypes. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = frozenset(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def is_float(array: Array) -> bool:
    """True for the four float dtypes that adapters are stored in."""
    return array.dtype in FLOATS


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
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        array = tensors[name]
        code = _CODES.get(array.dtype)
        if code is None:
            raise LoraFxError(f"tensor {name!r} has dtype {array.dtype}", f"cast to {_known()}")
        header[name] = {
            "dtype": code,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of a safetensors file in file order, and the texts of its header.

    Raises:
        LoraFxError: Not a safetensors file (what it is instead is said), or damaged.
    """
    refuse_other_kinds(path)
    tensors: dict[str, Array] = {}
    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                code = str(file.get_slice(name).get_dtype())
                if code not in DTYPES:
                    raise LoraFxError(
                        f"{path}: tensor {name!r} has dtype {code}; expected {_known()}",
                        "quantised adapters are not supported; save it in a float dtype",
                    )
                tensors[name] = np.asarray(file.get_tensor(name))
    except SafetensorError as error:
        raise LoraFxError(
            f"{path}: damaged safetensors file: {one_line(error)}",
            "the download or copy may be incomplete; fetch the file again",
        ) from error
    return tensors, metadata


def refuse_other_kinds(path: Path) -> None:
    """Raise with the right hint for files that are something else, by their first bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise LoraFxError(f"{path}: {error.strerror or error}", "is the path right?") from error
    # First, because the length of a header may begin with any byte, a pickle's included.
    if head[8:9] in (b"{", b" "):
        return
    if head.startswith(b"version https://git-lfs"):
        raise LoraFxError(
            f"{path}: a Git LFS pointer, not the tensors", "run git lfs pull in that repository"
        )
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        raise LoraFxError(
            f"{path}: a pickle; expected safetensors. Unpickling can run any code",
            "load it where it is trusted and save it as safetensors (save_pretrained does)",
        )
    if head[4:8] == b"TORT":
        raise LoraFxError(
            f"{path}: an ONNX Runtime adapter, which this reader does not take",
            "use the safetensors adapter that it was made from",
        )
    raise LoraFxError(
        f"{path}: not a safetensors file",
        "adapters are read from safetensors and .onnx_adapter files, and from folders of them",
    )


def _known() -> str:
    return ", ".join(str(dtype) for dtype in DTYPES.values())
