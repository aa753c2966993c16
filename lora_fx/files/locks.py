"""One writer for each target, by a lock file `.NAME.lock` next to it.

With flock the file is empty and a killed run leaves nothing that counts: the kernel drops the
lock with the process. The file is unlinked while it is held, so whoever gets the lock looks
whether the name still leads to the file it locked, and starts again if not; without that look,
one process could hold a file that has lost its name and another the file that took it. The
library filelock would leave its file beside every output.

Where there is no flock (some network file systems) filelock holds the lock: who creates
the file has it, and writes process and host into it, by which that of a dead process is known.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from lora_fx.errors import LoraFxError

BUSY = "another run is writing"
_ATTEMPTS = 1000  # each one that fails means that another run ended in between


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target`; it is not waited for.

    Raises:
        LoraFxError: Another run holds it.
        OSError: The lock file cannot be made.
    """
    lock = target.with_name(f".{target.name}.lock")
    fd = _acquire(lock, target)
    if fd is None:
        with _marked(lock, target):
            yield
        return
    try:
        yield
    finally:
        _release(fd, lock)


def _acquire(lock: Path, target: Path) -> int | None:
    """A descriptor of the lock file, which this process now holds; None without flock."""
    for _attempt in range(_ATTEMPTS):
        fd, must_unlink = _open(lock)
        is_locked = False
        mark = b""
        try:
            has_lock = _flock(fd)
            if has_lock is None:
                return None
            if not has_lock:
                must_unlink = False  # another run got the file that this one made, and unlinks it
                raise _busy(target)
            mark = os.read(fd, 1)
            is_locked = not mark and _leads_to(lock, fd)
        finally:
            if not is_locked and must_unlink:
                _release(fd, lock)
            elif not is_locked:
                os.close(fd)
        if is_locked:
            return fd
        if mark:  # by a process that found no flock: it lives, or its file is taken away
            with _marked(lock, target):
                pass
    raise _busy(target)


@contextlib.contextmanager
def _marked(lock: Path, target: Path) -> Iterator[None]:
    """Hold the lock without flock: the file exists, and names the host and the process."""
    from filelock import SoftFileLock, Timeout

    marker = SoftFileLock(lock, timeout=0)
    try:
        marker.acquire()
    except Timeout:
        hint = f"; if no such process runs ({_process_of(lock)}), remove {lock}"
        raise _busy(target, hint) from None
    try:
        yield
    finally:
        marker.release()


def _process_of(lock: Path) -> str:
    """The process that a lock file names, and its host."""
    try:
        words = lock.read_text(errors="replace").split()
    except OSError:
        return "unknown"
    return " ".join(words[:2]) or "unknown"


def _open(lock: Path) -> tuple[int, bool]:
    """Open the lock file, or make it.

    Returns:
        A descriptor, and whether the file was made by this call.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW
    for _attempt in range(_ATTEMPTS):
        with contextlib.suppress(FileExistsError):
            return os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with contextlib.suppress(FileNotFoundError):  # unlinked by its holder since
            mode = lock.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would be waited for
                raise LoraFxError(
                    f"{lock}: not a regular file", "remove it: it is not a lock of lora-fx"
                )
            return os.open(lock, flags), False
    raise OSError(
        f"{lock}: the lock file could not be opened, because other runs keep replacing it"
    )


def _flock(fd: int) -> bool | None:
    """Whether flock gives the lock; None where there is no flock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, EOPNOTSUPP: this file system has no locks
        return None
    return True


def _leads_to(lock: Path, fd: int) -> bool:
    """True where the lock's name is still that of the open file."""
    try:
        return os.path.samestat(os.stat(lock, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _release(fd: int, lock: Path) -> None:
    """Unlink the file while it is locked, then close it, and raise nothing.

    A file that could not be unlinked stops nobody.
    """
    for _attempt in range(2):
        with contextlib.suppress(OSError):
            if _leads_to(lock, fd):
                os.unlink(lock)
            break
    with contextlib.suppress(OSError):
        os.close(fd)


def _busy(target: Path, further_hint: str = "") -> LoraFxError:
    """The error of a target that another run is writing."""
    hint = "wait for it to end, or choose another output"
    return LoraFxError(f"{BUSY} {target}", hint + further_hint)
