"""Tensors from pickles that torch.save wrote; only this module opens pickles."""

from __future__ import annotations

import contextlib
import logging
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, retold, silenced, type_of
from lora_fx.fx import fake_tensors
from lora_fx.fx.tensors import to_numpy


def pickled(path: Path, *, mapped: bool = False) -> dict[str, torch.Tensor]:
    """Read the tensors of a pickle by torch's unpickler that runs no code (weights_only=True).

    Args:
        path: A state dict, name → tensor.
        mapped: Map the file, so that only what is used is read; not for torch's oldest format.

    Raises:
        LoraFxError: It holds anything but tensors, or is damaged.
    """
    refused = f"{path}: torch refuses to read it as tensors only"
    with retold(refused, "it may hold code; get the tensors as a safetensors file"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    entries = state.items() if isinstance(state, dict) else [("", None)]
    for name, value in entries:
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise LoraFxError(
                f"{path}: holds {type_of(value)} at {name!r}; expected a tensor by name",
                "check that save_pretrained wrote the file",
            )
    return dict(state)


def pickled_places(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return {name: (dtype, shape, first byte in the file)} of a pickle; no tensor is read.

    The byte is -1 of a tensor whose numbers do not lie in the file as they are, row by row.
    """
    # Under the mode torch notes where a storage lies, instead of reading it. It then looks at no
    # size, and ends the process where bytes would have to be turned.
    sizes = _records(path)
    mode = fake_tensors.FakeTensorMode() if sizes else contextlib.nullcontext()
    with silenced(levels={fake_tensors.LOGGER: logging.CRITICAL}):
        try:
            with mode:
                state = pickled(path)
        except LoraFxError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
            # torch 2.15 checks the indices of sparse tensors, which have no numbers under the mode
            state = pickled(path, mapped=True)
    places = {}
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        places[name] = (dtype, tuple(tensor.shape), _first_byte(tensor, sizes))
    return places


def _first_byte(tensor: torch.Tensor, sizes: Mapping[int, int]) -> int:
    """Return the position of a tensor's first byte in the file; -1 if not stored row by row.

    Args:
        tensor: A tensor that was read without its numbers.
        sizes: First byte → bytes of the parts of the file.
    """
    if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
        return -1
    record: int = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or 0
    start = int(tensor.storage_offset()) * tensor.element_size()
    if not tensor.is_contiguous() or start + tensor.nbytes > sizes.get(record, -1):
        return -1
    # a product that overflows may fit
    if math.prod(size or 1 for size in tensor.shape) >= 1 << 60:
        return -1
    return record + start


def _records(path: Path) -> dict[int, int]:
    """Return {first byte: bytes} of an archive's members, if a little-endian machine wrote it.

    Empty for an archive with compression, and for what is none.
    """
    damaged = contextlib.suppress(zipfile.BadZipFile, OSError, RuntimeError)
    sizes: dict[int, int] = {}
    with damaged, zipfile.ZipFile(path) as file, path.open("rb") as raw:
        for info in file.infolist():
            is_byte_order = info.filename.endswith("/byteorder")
            if is_byte_order and file.read(info) != b"little":
                return {}
            if info.compress_type != zipfile.ZIP_STORED:
                return {}
            # the lengths of the name and of what follows it
            raw.seek(info.header_offset + 26)
            name_length = int.from_bytes(raw.read(2), "little")
            extra_length = int.from_bytes(raw.read(2), "little")
            first = raw.tell() + name_length + extra_length
            sizes[first] = min(info.compress_size, path.stat().st_size - first)
    return sizes


def read_pickle(path: Path) -> dict[str, Array]:
    """Read the tensors of a pickle as arrays; see `pickled`."""
    tensors: dict[str, Array] = {}
    for name, value in pickled(path).items():
        try:
            tensors[name] = to_numpy(value.contiguous())
        except (TypeError, RuntimeError) as error:
            raise LoraFxError(
                f"{path}: tensor {name!r} has dtype {value.dtype}; expected a float dtype",
                "save the adapter in fp32, fp16 or bf16",
            ) from error
    return tensors
