"""The tensors of an .onnx_adapter file, read and written by ONNX Runtime.

`AdapterFormat.set_parameters` keeps pointers into the arrays: where those are gone before
`export_adapter`, the file holds garbage and nothing says so. They are held here, and the file is
read back and compared. bfloat16 has no numpy type in the runtime, so it goes as bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line

_BF16 = 16
"""BFLOAT16 in onnx.TensorProto.DataType."""

_TYPES = {"tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16)}


def read_file(path: Path) -> tuple[dict[str, Array], dict[str, int]]:
    """The tensors by name, in name order, and adapter_version and model_version.

    Raises:
        LoraFxError: Not such a file, or damaged.
    """
    from onnxruntime import AdapterFormat

    try:
        file = AdapterFormat.read_adapter(str(path))
        values = file.get_parameters()
        tensors = {name: _array(values[name]) for name in sorted(values)}
    except (RuntimeError, ValueError, UnicodeDecodeError) as error:
        raise LoraFxError(
            f"{path}: a damaged ONNX Runtime adapter: {one_line(error)}",
            "the download or copy may be incomplete; fetch the file again",
        ) from error
    versions = {
        "adapter_version": int(file.get_adapter_version()),
        "model_version": int(file.get_model_version()),
    }
    return tensors, versions


def write_file(path: Path, tensors: Mapping[str, Array], versions: Mapping[str, int]) -> None:
    """Write a file and compare what it reads back as, bit by bit.

    Args:
        path: The file to create.
        tensors: Arrays by name.
        versions: adapter_version and model_version.

    Raises:
        LoraFxError: The file does not hold what was given.
    """
    from onnxruntime import AdapterFormat, OrtValue

    held = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    bits = {n: a.view(np.uint16) for n, a in held.items() if a.dtype == ml_dtypes.bfloat16}
    file = AdapterFormat()
    file.set_adapter_version(versions["adapter_version"])
    file.set_model_version(versions["model_version"])
    values = {
        name: OrtValue.ortvalue_from_numpy_with_onnx_type(bits[name], _BF16)
        if name in bits
        else OrtValue.ortvalue_from_numpy(array)
        for name, array in held.items()
    }
    file.set_parameters(values)
    file.export_adapter(str(path))
    again, _ = read_file(path)
    for name, array in held.items():
        got = again.get(name)
        if got is None or got.dtype != array.dtype or got.tobytes() != array.tobytes():
            raise LoraFxError(f"{path}: tensor {name!r} does not read back as it was written")


def _array(value: Any) -> Array:
    """An own copy of a value of the runtime."""
    dtype = _TYPES.get(value.data_type())
    if dtype is None:
        return np.array(value.numpy())
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(data, dtype).reshape(value.shape()).copy()
