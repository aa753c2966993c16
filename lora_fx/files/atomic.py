"""Writing that leaves nothing behind: a lock, a temporary sibling, fsync, rename.

Beside a target NAME lie, while it is written, `.NAME.lock` and the folder
`.NAME.lora_fx_XXXXXXXX.tmp` with what is being written. A killed run leaves the folder; the next
one removes it. Everything here has a way without the calls that a platform or a file system lacks.
An input of the run, and what is somebody's work, are never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from lora_fx.errors import LoraFxError, explain, explained
from lora_fx.files.entries import exists, inode_of, is_folder
from lora_fx.files.leftovers import OLD, clear_stale, discard
from lora_fx.files.locks import locked
from lora_fx.files.permissions import modes_of_copies, open_up
from lora_fx.files.replaceable import check_apart, check_replaceable, write_contents
from lora_fx.files.run_files import check_unchanged, run_of_files
from lora_fx.files.side_outputs import Beside
from lora_fx.text import human

_ONLY_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    own: bool = False,
    listed: bool = True,
    beside: Beside | None = None,
    parts: Beside | None = None,
) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error.

    The block may make a file or a folder of it. Files get the mode 0666 & ~umask and folders
    0777 & ~umask, however they were made, but for copies (see copy_file), which nobody reads who
    could not read the original; links, and files with other names, stay as they are.
    On any error, Ctrl-C included, what was written is removed and `path` is as it was; only when
    the very last step fails, the fsync of the parent, the whole output stands, and the exit code
    of the error is 1. One process at a
    time writes a path. What a killed one left is removed first.

    Args:
        path: The output.
        force: Replace what lora-fx lets be replaced.
        own: `path` is this run's own state, which it may have read.
        listed: A folder gets the list of its files that makes it lora-fx's own.
        beside: The outputs that this one belongs to.
        parts: The outputs that belong to this one; it is left when this one has its name or not.

    Raises:
        LoraFxError: `path` exists and force is not given, or does not count; its parent does not
            exist, another run is writing it, the disk is full, or the file system refuses.
    """
    target = Path(path)
    with explained(target, itself=True):
        check_output(target, force=force, own=own)
        if (run := run_of_files()) is not None:
            run.outputs.setdefault(target, inode_of(target))
        lock = contextlib.ExitStack()
        lock.enter_context(locked(target))
    with lock, contextlib.ExitStack() as stack:
        token = secrets.token_hex(4) if beside is None else beside.token(target)
        holder = target.with_name(f".{target.name}.lora_fx_{token}.tmp")
        temporary = holder / target.name
        (beside or stack).callback(discard, holder, target)  # what it replaced may come back
        if parts is not None:  # left before the folder goes by which a later run finds them
            parts.target, parts.temporary = target, temporary
            stack.enter_context(parts)
        with explained(target, itself=True):
            clear_stale(target)
            check_output(target, force=force, own=own)
            holder.mkdir()
            mode = stat.S_IMODE(holder.stat().st_mode) & 0o777  # what the umask leaves
        narrow: dict[Path, int] = {}
        token_of_modes = modes_of_copies.set(narrow)
        try:
            with explained(target, _ONLY_WRITING, itself=True):
                yield temporary
        finally:
            modes_of_copies.reset(token_of_modes)
        with explained(target, itself=True):
            if listed and is_folder(temporary):
                write_contents(temporary)
            open_up(temporary, mode, narrow)
            sync(temporary)
            check_output(target, force=force, own=own, new=temporary)
            check_unchanged()
            if beside is not None:
                beside.add(target, temporary)
            _swap(temporary, target, holder / OLD)
        try:
            _sync_folder(target.parent)
        except OSError as error:
            if beside is not None:  # which takes it back
                raise explain(error, target) from error
            told = explain(error, f"{target} was written, and its folder is not synced")
            raise LoraFxError(told.message, told.hint, exit_code=1) from error


EXISTS = "choose another output, or --force to replace it"


def check_output(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    own: bool = False,
    new: Path | None = None,
    names: Collection[str] | None = None,
) -> None:
    """Refuse an output, before any work is done, that exists or whose folder does not.

    Args:
        path: The output.
        force: It may exist, where lora-fx lets it be replaced.
        own: It is this run's own state, which it may have read.
        new: What takes its place, once that is written.
        names: The files of a folder that is written, where they are known before.
    """
    target = Path(path)
    if target.name in ("", "..") or "\0" in str(target):
        raise LoraFxError(f"{str(target)!r} names no file", "name a file or folder to create")
    if str(target).startswith("hf:"):
        upload = "write a folder, then: hf upload ORG/NAME FOLDER"
        raise LoraFxError(f"{target}: nothing is uploaded", upload)
    with explained(target):
        if exists(target) and not force:
            raise LoraFxError(f"{target} exists already", EXISTS)
        if exists(target):
            check_replaceable(target, new, names)
            if not own:
                check_apart(target)
        if not target.parent.is_dir():
            raise LoraFxError(f"the folder {target.parent} does not exist", "create it first")


def check_space(folder: str | os.PathLike[str], needed: int) -> None:
    """Refuse when the disk of `folder` has less than `needed` bytes free for this user."""
    with explained(folder):
        disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed:  # a total of 0: the file system does not say
        raise LoraFxError(
            f"{os.fspath(folder)}: {human(disk.free)}B free, expected at least {human(needed)}B",
            "free space, or write to another disk",
        )


def sync(path: Path) -> None:
    """Fsync a file, or every file of a folder and the folder; links are not followed."""
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        for child in path.iterdir():
            sync(child)
        _sync_folder(path)
    elif stat.S_ISREG(mode):
        _fsync(path)


def _sync_folder(path: Path) -> None:
    try:
        _fsync(path)
    except OSError as error:
        # Some network file systems sync no folders.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _swap(new: Path, target: Path, old: Path) -> None:
    """Give `new` the name `target`; a folder with content cannot be renamed over."""
    if not (exists(target) and (is_folder(target) or is_folder(new))):
        os.replace(new, target)
    elif not _exchange(new, target):
        target.rename(old)  # back it comes by discard, should the next line fail
        new.rename(target)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        one, two = os.fsencode(a), os.fsencode(b)
        here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, and macOS' RENAME_SWAP
        if sys.platform == "linux":
            return bool(libc.renameat2(here, one, here, two, swap) == 0)
        return sys.platform == "darwin" and bool(libc.renamex_np(one, two, swap) == 0)
    except (ImportError, AttributeError, TypeError, OSError):
        return False
