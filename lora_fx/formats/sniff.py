"""What a file is, by its first bytes, its header and what lies beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import read_header, refuse_other_kinds


@dataclass(frozen=True)
class Seen:
    """What a format's `detect` decides by; no tensor is read for it.

    Attributes:
        head: The first 64 bytes.
        names: Tensor names of a safetensors file; empty for others.
        metadata: The texts of its header.
        config: True where adapter_config.json lies beside it.
    """

    head: bytes
    names: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: bool = False


def look(path: Path) -> Seen:
    """See a file.

    Raises:
        LoraFxError: A pickle, a Git LFS pointer, no safetensors file, or a damaged one.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise LoraFxError(f"{path}: {error.strerror or error}", "is the path right?") from error
    config = (path.parent / "adapter_config.json").is_file()
    if head[4:8] == b"TORT" and head[8:9] not in (b"{", b" "):
        return Seen(head, config=config)
    refuse_other_kinds(path)
    header = read_header(path)
    return Seen(head, tuple(header.tensors), header.metadata, config)
