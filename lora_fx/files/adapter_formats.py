"""The adapter formats, as far as this folder needs them, which stands below them.

`lora_fx.formats.registry` registers itself here when it is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class AdapterFiles(Protocol):
    """All adapter formats, as far as files are told apart and replaced."""

    def suffixes(self) -> tuple[str, ...]:
        """The endings of adapter files, each with its dot."""

    def ending_by_magic(self, head: bytes) -> str:
        """The ending of the files that begin so; empty where no format has this magic."""

    def kind_of(self, file: Path, head: bytes) -> str | None:
        """The kind of an adapter file, for people, by its first 64 KiB.

        Returns:
            None for the file of no adapter format, and an empty text for one that is no adapter.
        """


_registered: list[AdapterFiles] = []


def register(formats: AdapterFiles) -> None:
    """Set the value of `adapter_files`."""
    _registered[:] = [formats]


def adapter_files() -> AdapterFiles | None:
    """The adapter formats; None in a process that has not imported them."""
    if not _registered:
        return None
    return _registered[0]
