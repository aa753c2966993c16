"""Who may read what is written."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path

from lora_fx.files.read import open_input

modes_of_copies: ContextVar[dict[Path, int] | None] = ContextVar("narrow", default=None)
"""Copies within a block of `replacing` → the mode of what each is a copy of."""


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file into what a block of `replacing` makes.

    Others get no more access to the copy than they have to the source.

    Args:
        source: Where links lead is copied: who names a file of a folder asks `companion` first.
        target: A new name within what the block makes.

    Raises:
        LoraFxError: The source cannot be read, or is no regular file.
    """
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open_input(source) as read, os.fdopen(os.open(target, new, 0o600), "wb") as written:
        keep_mode(os.fstat(read.fileno()), target)
        shutil.copyfileobj(read, written)


def keep_mode(source: os.stat_result, target: Path) -> None:
    """Let a new file be read by no more people than the one that it is made of."""
    modes = modes_of_copies.get()
    if modes is not None:
        modes[target] = stat.S_IMODE(source.st_mode) | stat.S_IRUSR | stat.S_IWUSR


def open_up(path: Path, mode: int, narrow: Mapping[Path, int]) -> None:
    """Give files `mode` without its x, folders `mode`: what is made by tempfile has 0600."""
    found = path.lstat()
    folder = stat.S_ISDIR(found.st_mode)
    wanted = mode if folder else mode & 0o666 & narrow.get(path, 0o777)
    want = stat.S_IMODE(found.st_mode) & ~0o777 | wanted
    alone = found.st_nlink < 2  # or an input would change with its other name
    if want != stat.S_IMODE(found.st_mode) and (folder or (stat.S_ISREG(found.st_mode) and alone)):
        path.chmod(want)
    if folder:
        for child in path.iterdir():
            open_up(child, mode, narrow)
