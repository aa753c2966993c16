"""Entries of a folder, read without following links."""

from __future__ import annotations

import stat
from pathlib import Path


def exists(path: Path) -> bool:
    """Whether the path exists, also as a broken link; errors are raised, unlike in lexists."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: Path) -> bool:
    """Whether the path is a folder, and not a link to one; raise if it does not exist."""
    return stat.S_ISDIR(path.lstat().st_mode)


def inode_of(path: Path) -> int | None:
    """Return the inode of a path; None if it does not exist."""
    try:
        return path.lstat().st_ino
    except OSError:
        return None
