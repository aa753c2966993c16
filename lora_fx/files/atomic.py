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
from lora_fx.files.leftovers import REPLACED, clear_stale, discard, temporary_folder
from lora_fx.files.locks import locked
from lora_fx.files.permissions import open_up, remembering_modes
from lora_fx.files.replaceable import check_apart, check_replaceable, write_contents
from lora_fx.files.run_files import check_unchanged, run_of_files
from lora_fx.files.side_outputs import Beside
from lora_fx.text import human

_ONLY_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that only writing raises; the block also reads, and names the files it reads itself."""
_AT_FDCWD = -100  # linux/fcntl.h
_EXCHANGE = 2  # Linux' RENAME_EXCHANGE and macOS' RENAME_SWAP


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

    The block may make a file or a folder of it. One process at a time writes a path.

    1. `path` is locked, and what a killed run left of it is removed.
    2. The block writes.
    3. A folder gets the list of its files. Files get the mode 0666 & ~umask and folders
       0777 & ~umask, however they were made, but nobody reads a copy (see copy_file) who could not
       read the original; links, and files with other names, stay as they are.
    4. All is written to disk, and whether `path` may be replaced is checked again.
    5. What was written gets its name, and the folder is written to disk.

    On any error, Ctrl-C included, what was written is removed and `path` is as it was. Only where
    the very last step fails, the fsync of the parent, the whole output stands, and the exit code
    of the error is 1.

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
        run = run_of_files()
        if run is not None:
            run.outputs.setdefault(target, inode_of(target))
        lock = contextlib.ExitStack()
        lock.enter_context(locked(target))

    with lock, contextlib.ExitStack() as stack:
        token = secrets.token_hex(4) if beside is None else beside.token(target)
        holder = temporary_folder(target, token)
        temporary = holder / target.name
        (beside or stack).callback(discard, holder, target)  # what it replaced may come back
        if parts is not None:  # left before the folder goes by which a later run finds them
            parts.target = target
            parts.temporary = temporary
            stack.enter_context(parts)

        with explained(target, itself=True):
            clear_stale(target)
            check_output(target, force=force, own=own)
            holder.mkdir()
            folder_mode = stat.S_IMODE(holder.stat().st_mode) & 0o777  # what the umask leaves

        with remembering_modes() as modes_of_copies, explained(target, _ONLY_WRITING, itself=True):
            yield temporary

        with explained(target, itself=True):
            if listed and is_folder(temporary):
                write_contents(temporary)
            open_up(temporary, folder_mode, modes_of_copies)
            sync(temporary)
            check_output(target, force=force, own=own, new=temporary)
            check_unchanged()
            if beside is not None:
                beside.add(target, temporary)
            _swap(temporary, target, holder / REPLACED)
        _sync_folder_of(target, beside)


def _sync_folder_of(target: Path, beside: Beside | None) -> None:
    """Write the folder of an output that has its name to disk.

    Args:
        target: The output.
        beside: The outputs that it belongs to, which take it back after an error.

    Raises:
        LoraFxError: The file system refuses; the exit code is 1 if the output was written.
    """
    try:
        _sync_folder(target.parent)
    except OSError as error:
        if beside is not None:
            raise explain(error, target) from error
        explained_error = explain(
            error, f"{target} was written, but its folder could not be synced to disk"
        )
        raise LoraFxError(explained_error.message, explained_error.hint, exit_code=1) from error


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
        force: The output may exist, if it is of a kind that lora-fx replaces.
        own: The output is this run's own state, which the run may have read.
        new: What takes its place, once that is written.
        names: The files of a folder that is written, where they are known before.
    """
    target = Path(path)
    if target.name in ("", "..") or "\0" in str(target):
        raise LoraFxError(
            f"{str(target)!r} is not the name of a file", "name a file or folder to create"
        )
    if str(target).startswith("hf:"):
        hint = "write a folder, then: hf upload ORG/NAME FOLDER"
        raise LoraFxError(f"{target}: lora-fx does not upload to the Hub", hint)
    with explained(target):
        if exists(target):
            if not force:
                raise LoraFxError(f"{target} exists already", EXISTS)
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


def _swap(new: Path, target: Path, replaced: Path) -> None:
    """Give `new` the name `target`; a folder with content cannot be renamed over.

    Args:
        new: What was written.
        target: The name that it gets.
        replaced: Where what had this name lies meanwhile, where the two cannot change places.
    """
    is_with_folder = exists(target) and (is_folder(target) or is_folder(new))
    if not is_with_folder:
        os.replace(new, target)
    elif not _exchange(new, target):
        target.rename(replaced)  # `discard` brings it back, should the next line fail
        new.rename(target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        first_name = os.fsencode(first)
        second_name = os.fsencode(second)
        if sys.platform == "linux":
            status = libc.renameat2(_AT_FDCWD, first_name, _AT_FDCWD, second_name, _EXCHANGE)
            return bool(status == 0)
        if sys.platform == "darwin":
            status = libc.renamex_np(first_name, second_name, _EXCHANGE)
            return bool(status == 0)
        return False
    except (ImportError, AttributeError, TypeError, OSError):
        return False
