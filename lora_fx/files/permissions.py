"""Permissions of written files."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

from lora_fx.files.read import open_input

_modes_of_copies: ContextVar[dict[Path, int] | None] = ContextVar("modes", default=None)


@contextlib.contextmanager
def remembering_modes() -> Iterator[Mapping[Path, int]]:
    """A block in which files are copied: each copy → the mode of what it is a copy of."""
    modes: dict[Path, int] = {}
    token = _modes_of_copies.set(modes)
    try:
        yield modes
    finally:
        _modes_of_copies.reset(token)


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file into what a block of `replacing` makes.

    Others get no more access to the copy than they have to the source.

    Args:
        source: The file. A link is followed: a caller that names a file of a folder asks
            `companion` first.
        target: A new name within what the block makes.

    Raises:
        LoraFxError: The source cannot be read, or is no regular file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open_input(source) as original, os.fdopen(os.open(target, flags, 0o600), "wb") as copy:
        keep_mode(os.fstat(original.fileno()), target)
        shutil.copyfileobj(original, copy)


def keep_mode(source: os.stat_result, target: Path) -> None:
    """Give a new file no more readers than the file that it is made from."""
    modes = _modes_of_copies.get()
    if modes is not None:
        modes[target] = stat.S_IMODE(source.st_mode) | stat.S_IRUSR | stat.S_IWUSR


def open_up(path: Path, folder_mode: int, modes_of_copies: Mapping[Path, int]) -> None:
    """Give files and folders the modes that the umask leaves: what is made by tempfile has 0600.

    Args:
        path: A file, or a folder with all that lies in it. Links, and files with other names, stay
            as they are.
        folder_mode: The mode of folders; files get it without its x.
        modes_of_copies: File → the mode of what it is a copy of, which it does not exceed.
    """
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        _change_mode(path, status, folder_mode)
        for child in path.iterdir():
            open_up(child, folder_mode, modes_of_copies)
        return
    has_other_names = status.st_nlink > 1  # an input would change with its other name
    if stat.S_ISREG(status.st_mode) and not has_other_names:
        _change_mode(path, status, folder_mode & 0o666 & modes_of_copies.get(path, 0o777))


def _change_mode(path: Path, status: os.stat_result, permissions: int) -> None:
    """Set the permissions of a file or folder where they differ; its other bits stay."""
    mode = stat.S_IMODE(status.st_mode)
    new_mode = mode & ~0o777 | permissions
    if new_mode != mode:
        path.chmod(new_mode)
