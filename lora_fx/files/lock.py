"""One writer a target: the lock file `.NAME.lock` beside it.

With flock the file's content means nothing and a killed run leaves nothing that counts: the kernel
drops the lock with the process. The file is unlinked while it is held, so whoever gets the lock
looks whether the name still leads to the file it locked, and starts again if not; without that
look, one process could hold a file that has lost its name and another the file that took it.

Where there is no flock (Windows, some network file systems) who creates the file holds it, and
writes "PID HOST" into it, by which the lock of a dead process is known.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_fx.errors import LoraFxError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TRIES = 1000  # each lost one means that another run ended in between


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target`; it is not waited for.

    Raises:
        LoraFxError: Another run holds it.
        OSError: The lock file cannot be made.
    """
    lock = target.with_name(f".{target.name}.lock")
    fd = _acquire(lock, target)
    try:
        yield
    finally:
        _release(fd, lock)


def _acquire(lock: Path, target: Path) -> int:
    """A descriptor of the lock file, which this process now holds."""
    for _ in range(_TRIES):
        fd, made = _open(lock)
        got: bool | None = False
        held = False
        try:
            got = _flock(fd)
            owner = b"" if made else os.read(fd, 300)
            if got is False:
                raise _busy(target)
            if got or made:
                if owner and _alive(owner):  # made by a process that found no flock, and lives
                    raise _busy(target, lock, owner)
                if got is None:
                    os.write(fd, _me())
                held = _leads_to(lock, fd)
        except BaseException:
            if made and got is not False:
                _release(fd, lock)
                fd = -1
            raise
        finally:
            if fd >= 0 and not held:
                os.close(fd)
        if held:
            return fd
        if got is None and not made:
            _take_away(lock, owner, target)
    raise _busy(target)


def _open(lock: Path) -> tuple[int, bool]:
    """A descriptor, and whether the file was made by this call."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):
            return os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with contextlib.suppress(FileNotFoundError):  # unlinked by its holder since
            return os.open(lock, flags), False
    raise OSError(f"{lock} comes and goes")


def _flock(fd: int) -> bool | None:
    """Whether flock gave the lock; None where there is no flock."""
    if not hasattr(fcntl, "flock"):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, EOPNOTSUPP: this file system has no locks
        return None
    return True


def _leads_to(lock: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _release(fd: int, lock: Path) -> None:
    """Unlink while held, then let go; Windows unlinks nothing that is open. Raises nothing."""
    ours = True
    with contextlib.suppress(OSError):
        ours = _leads_to(lock, fd)
    if ours and os.name == "posix":
        _unlink(lock)
    with contextlib.suppress(OSError):
        os.close(fd)
    if ours and os.name != "posix":
        _unlink(lock)


def _unlink(lock: Path) -> None:
    """A second try, then the file stays: one without a holder stops nobody."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            os.unlink(lock)
            return


# --- without flock -------------------------------------------------------------------------------


def _me() -> bytes:
    return f"{os.getpid()} {_host()}\n".encode()


def _host() -> str:
    return os.uname().nodename if hasattr(os, "uname") else ""


def _alive(owner: bytes) -> bool:
    """False when the process that wrote `owner` certainly runs no more."""
    pid, _, host = owner.decode(errors="replace").strip().partition(" ")
    if host != _host() or not pid.isdigit() or os.name != "posix":
        return True  # os.kill(pid, 0) would interrupt the process on Windows
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _take_away(lock: Path, owner: bytes, target: Path) -> None:
    """Remove a dead process's lock file; raise when its process lives."""
    if os.name != "posix":
        try:
            os.unlink(lock)  # refused there while its holder has it open: trying is the test
        except PermissionError as error:
            raise _busy(target, lock, owner) from error
        return
    if not owner or _alive(owner):
        raise _busy(target, lock, owner)
    # Another run may have done so and made its own since: look at what was moved.
    aside = lock.with_name(f"{lock.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(lock, aside)
        if aside.read_bytes() != owner and not os.path.lexists(lock):
            os.rename(aside, lock)
        else:
            os.unlink(aside)


def _busy(target: Path, lock: Path | None = None, owner: bytes = b"") -> LoraFxError:
    hint = "wait for it to end, or choose another output"
    if lock is not None:
        who = owner.decode(errors="replace").strip() or "unknown"
        hint += f"; if no such process runs ({who}), remove {lock}"
    return LoraFxError(f"another run is writing {target}", hint)
