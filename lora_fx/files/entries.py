"""Entries of a folder, without following links."""

from __future__ import annotations

import stat
from pathlib import Path


def exists(path: Path) -> bool:
    """True for a link to nothing too. Raises when that cannot be told, unlike lexists."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: Path) -> bool:
    """True for a folder; False for a link to one. Raises where nothing has the name."""
    return stat.S_ISDIR(path.lstat().st_mode)


def inode_of(path: Path) -> int | None:
    """The inode that has a name; None for none."""
    try:
        return path.lstat().st_ino
    except OSError:
        return None
