"""The facts that identify a file's format: its header, its first bytes, and a config next to it."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

from lora_fx.errors import LoraFxError
from lora_fx.files.read import open_input
from lora_fx.files.safetensors import Header, first_bytes, read_header
from lora_fx.files.strict_json import read_json
from lora_fx.files.tensor_files import refuse_other_kinds
from lora_fx.formats.format import FileHead

CONFIG = "adapter_config.json"
_ARRAY = ".npy"
_BYTES = 4
"""The bytes of an element in the .npz of an adapter: those are fp32."""


def tensors_head(path: Path) -> FileHead:
    """Read the head of a safetensors file, of an .npz, or of a pickle within `trusting`.

    Raises:
        LoraFxError: A pickle, a Git LFS pointer, no file of tensors, or a damaged one.
    """
    sizes = sizes_in_npz(path)
    if sizes:
        return FileHead(
            first_bytes(path),
            names=tuple(sizes),
            config=has_config(path),
            elements=sum(sizes.values()) // _BYTES,
            config_fields=config_fields(path),
        )
    refuse_other_kinds(path)
    return head_with(read_header(path), first_bytes(path), path)


def head_with(header: Header, head: bytes, path: Path) -> FileHead:
    """Return the head of a file with this header and these first bytes."""
    return FileHead(
        head,
        names=tuple(header.tensors),
        metadata=header.metadata,
        config=has_config(path),
        elements=sum(math.prod(tensor.shape) for tensor in header.tensors.values()),
        config_fields=config_fields(path),
    )


def sizes_in_npz(path: Path) -> dict[str, int]:
    """Return the bytes of the arrays in an .npz by name; empty for a file that is not one."""
    if not first_bytes(path).startswith(b"PK\x03\x04"):
        return {}
    try:
        with open_input(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return {}
    if not all(member.filename.endswith(_ARRAY) for member in members):
        return {}
    return {member.filename.removesuffix(_ARRAY): member.file_size for member in members}


def has_config(path: Path) -> bool:
    """Whether adapter_config.json exists next to a file."""
    return (path.parent / CONFIG).is_file()


def config_fields(path: Path) -> frozenset[str]:
    """Return the names of the fields in adapter_config.json next to a file; none without one.

    A damaged config has none here: the format that needs it says what is wrong with it.
    """
    if not has_config(path):
        return frozenset()
    try:
        return frozenset(read_json(path.parent / CONFIG))
    except LoraFxError:
        return frozenset()
