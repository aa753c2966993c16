"""The interface to adapter formats that this folder uses; `lora_fx.formats` implements it.

`lora_fx.formats.registry` registers itself here when it is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class AdapterFiles(Protocol):
    """All adapter formats: how to recognise and replace their files."""

    def suffixes(self) -> tuple[str, ...]:
        """Return the suffixes of adapter files, each with its dot."""

    def ending_by_magic(self, head: bytes) -> str:
        """Return the suffix of files that begin with this magic; empty if no format has it."""

    def kind_of(self, file: Path, head: bytes) -> str | None:
        """Return the kind of an adapter file, for people, from its first 64 KiB.

        Returns:
            None for the file of no adapter format, and an empty text for one that is no adapter.
        """


_registered: list[AdapterFiles] = []


def register(formats: AdapterFiles) -> None:
    """Set the value of `adapter_files`."""
    _registered[:] = [formats]


def adapter_files() -> AdapterFiles | None:
    """Return the adapter formats; None in a process that has not imported them."""
    if not _registered:
        return None
    return _registered[0]
