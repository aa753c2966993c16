"""The head of a file, by which formats know it: its header, and whether a config lies beside it."""

from __future__ import annotations

import math
from pathlib import Path

from lora_fx.files.safetensors import Header, first_bytes, read_header
from lora_fx.files.tensor_files import refuse_other_kinds
from lora_fx.formats.format import FileHead


def tensors_head(path: Path) -> FileHead:
    """Read the head of a safetensors file, or of a pickle within `trusting`.

    Raises:
        LoraFxError: A pickle, a Git LFS pointer, no safetensors file, or a damaged one.
    """
    refuse_other_kinds(path)
    return head_with(read_header(path), first_bytes(path), path)


def head_with(header: Header, head: bytes, path: Path) -> FileHead:
    """The head of a file with such a header and such first bytes."""
    return FileHead(
        head,
        names=tuple(header.tensors),
        metadata=header.metadata,
        config=has_config(path),
        elements=sum(math.prod(tensor.shape) for tensor in header.tensors.values()),
    )


def has_config(path: Path) -> bool:
    """Whether adapter_config.json lies beside a file."""
    return (path.parent / "adapter_config.json").is_file()
