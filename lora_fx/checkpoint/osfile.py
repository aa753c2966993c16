"""Writing that leaves nothing behind: a temporary sibling, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_fx.errors import LoraFxError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error.

    The block may make a file or a directory of it. On any error, Ctrl-C included, what was
    written is removed and `path` is as it was.

    Raises:
        LoraFxError: `path` exists and force is not given, or its parent does not exist.
    """
    target = Path(path)
    check_output(target, force=force)
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        temporary = holder / target.name
        yield temporary
        sync(temporary)
        _swap(temporary, target, holder / "replaced")
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _swap(new: Path, target: Path, old: Path) -> None:
    """Give `new` the name `target`; a folder with content cannot be renamed over."""
    if not target.is_dir() or target.is_symlink():
        os.replace(new, target)
        return
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse an output that exists, or whose folder does not, before any work is done."""
    target = Path(path)
    if (target.exists() or target.is_symlink()) and not force:
        raise LoraFxError(f"{target} exists", "choose another output, or --force to replace it")
    if not target.parent.is_dir():
        raise LoraFxError(f"the folder {target.parent} does not exist", "create it first")


def sync(path: Path) -> None:
    """Fsync a file, or every file of a folder and the folder."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
        _sync_folder(path)
        return
    with path.open("rb") as f:
        os.fsync(f.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":  # folders cannot be opened elsewhere
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
