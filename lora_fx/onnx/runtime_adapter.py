"""The tensors of an .onnx_adapter file, read and written by ONNX Runtime.

`AdapterFormat.set_parameters` keeps pointers into the arrays: where those are gone before
`export_adapter`, the file holds garbage and nothing says so. So `write_file` keeps the arrays until
the file is written, reads the file back and compares. bfloat16 has no numpy type in the runtime, so
it goes as bits.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import ANY_BASE, BASE_NUMBER
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line, retold
from lora_fx.files.read import open_input
from lora_fx.onnx.manifest import Manifest

if TYPE_CHECKING:
    import onnxruntime as ort


SERVED = int.from_bytes(b"LFX1")
"""The adapter_version of files with A [*batch, in, rank] and B [*batch, rank, out], like a graph's
inputs: the runtime's file format has room for no other mark."""
_BF16 = 16
"""The number of BFLOAT16 in onnx.TensorProto.DataType."""
BLOCK = 1 << 24
"""The bytes of two tensors that are compared at a time."""


def read_file(path: Path) -> tuple[dict[str, Array], dict[str, int]]:
    """Return the tensors by name, in name order, and adapter_version and model_version.

    Raises:
        LoraFxError: Not there, not such a file, or damaged.
    """
    from onnxruntime import AdapterFormat

    open_input(path).close()  # the runtime calls a file that is not there damaged
    damaged = f"{path}: a damaged ONNX Runtime adapter"
    hint = "the download or copy may be incomplete; fetch the file again"
    with retold(damaged, hint, (RuntimeError, ValueError)):
        file = AdapterFormat.read_adapter(str(path))
        values = file.get_parameters()
        tensors = {name: _array(values[name]) for name in sorted(values)}
    versions = {
        "adapter_version": int(file.get_adapter_version()),
        "model_version": int(file.get_model_version()),
    }
    return tensors, versions


def write_file(path: Path, tensors: Mapping[str, Array], versions: Mapping[str, int]) -> None:
    """Write a file, read it back, and compare it bit by bit.

    Args:
        path: The file to create.
        tensors: Arrays by name.
        versions: adapter_version and model_version.

    Raises:
        LoraFxError: The file does not hold what was given.
    """
    from onnxruntime import AdapterFormat, OrtValue

    # both dicts live until the file is written: see the top of this module
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    bits = {
        name: array.view(np.uint16)
        for name, array in arrays.items()
        if array.dtype == ml_dtypes.bfloat16
    }
    values = {
        name: OrtValue.ortvalue_from_numpy(array)
        for name, array in arrays.items()
        if name not in bits
    }
    for name, array in bits.items():
        values[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BF16)

    file = AdapterFormat()
    file.set_adapter_version(versions["adapter_version"])
    file.set_model_version(versions["model_version"])
    file.set_parameters(values)
    try:
        file.export_adapter(str(path))
        read_back, _ = read_file(path)
    except (RuntimeError, LoraFxError) as error:
        _refuse_full_disk(path, 65_536 + sum(array.nbytes for array in arrays.values()))
        raise LoraFxError(
            f"{path.name}: ONNX Runtime cannot write it: {one_line(error, 160)}",
            "check the free space and the permissions",
        ) from error

    for name, array in arrays.items():
        if not _same_bits(read_back.get(name), array):
            raise LoraFxError(
                f"{path}: tensor {name!r} differs when it is read back",
                "check that the disk is not full, and write it again",
            )


def _same_bits(read: Array | None, written: Array) -> bool:
    """Whether an array was read with the dtype and bytes that were written."""
    if read is None or read.dtype != written.dtype:
        return False
    if read.shape != written.shape:
        return False
    read_bytes = read.reshape(-1).view(np.uint8)
    written_bytes = written.reshape(-1).view(np.uint8)
    for start in range(0, read.nbytes, BLOCK):  # a head of 1 GB is not copied whole
        block = slice(start, start + BLOCK)
        if not np.array_equal(read_bytes[block], written_bytes[block]):
            return False
    return True


def write_adapter(adapter: Adapter, manifest: Manifest, path: Path) -> None:
    """Write an .onnx_adapter for the file that the manifest belongs to."""
    tensors = manifest.tensors(adapter)
    base = ANY_BASE
    if any(slot.d in tensors for slot in manifest.slots.values()):
        base = int(adapter.metadata[BASE_NUMBER])
    write_file(path, tensors, {"adapter_version": SERVED, "model_version": base})


def _refuse_full_disk(path: Path, size: int) -> None:
    """Write `size` bytes at a path to learn whether the disk is full, as the runtime does not say.

    Raises:
        OSError: The system cannot write them.
    """
    with open(path, "wb") as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())


def _array(value: ort.OrtValue) -> Array:
    """Return a copy of a runtime value's array, because the runtime owns its memory."""
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy())
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(data, ml_dtypes.bfloat16).reshape(value.shape()).copy()
