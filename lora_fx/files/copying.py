"""Bytes from file to file by the fastest way that the system has.

Descriptors with offsets, so that threads share them: nothing here moves a file position that
others see.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

CHUNK = 1 << 20
"""Bytes that are copied through memory at once."""

_CALL = 1 << 28  # for the kernel in one call, so that Ctrl-C waits for no more
_FICLONE = 0x40049409  # linux/fs.h
_CANNOT = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM)
"""Errors of calls that this system or this pair of files does not have; others are real."""


def copy_range(source: int, target: int, source_at: int, target_at: int, count: int) -> None:
    """Copy `count` bytes between two descriptors: in the kernel, or through memory.

    Args:
        source: Open for reading.
        target: Open for writing, not for appending.
        source_at: First byte to read.
        target_at: Where it goes.
        count: Bytes.

    Raises:
        OSError: What reading or writing gave; without errno when the source ends early.
    """
    done = 0
    while done < count and hasattr(os, "copy_file_range"):
        at, n = source_at + done, min(count - done, _CALL)
        try:
            n = os.copy_file_range(source, target, n, at, target_at + done)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            n = 0
        if n == 0:  # not supported, or the end: the other way tells which
            break
        done += n
    # sendfile was no faster than this between two file systems, and threads took turns at it
    chunk = memoryview(bytearray(min(CHUNK, count - done)))
    while done < count:
        data = chunk[: count - done]
        read_into(source, data, source_at + done)
        write_at(target, data, target_at + done)
        done += len(data)


def read_into(fd: int, data: memoryview, at: int) -> None:
    """Fill `data` with the bytes from `at`.

    Raises:
        OSError: The file ends before (without errno), or cannot be read.
    """
    end, rest = at + len(data), data
    while rest:
        n = os.preadv(fd, [rest], end - len(rest))
        if n <= 0:
            raise OSError(f"the file ends at byte {end - len(rest)}, expected {end}")
        rest = rest[n:]


def write_at(fd: int, data: bytes | bytearray | memoryview, at: int) -> None:
    """All of `data` at `at`, however often the system has to be asked."""
    rest = memoryview(data).cast("B")
    while rest:
        n = os.pwrite(fd, rest, at)
        if n <= 0:
            raise OSError(errno.EIO, f"{len(rest)} bytes to write and none written")
        rest, at = rest[n:], at + n


def preallocate(fd: int, size: int) -> None:
    """Make a new file `size` bytes long, with its space reserved where the system can.

    Raises:
        OSError: ENOSPC when that much is not free, before any byte is written.
    """
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
    os.ftruncate(fd, size)


def reflink(source: Path, target: Path) -> bool:
    """Make `target` a copy of `source` that shares its blocks, where the file system can.

    Returns:
        False where it cannot; `target` then does not exist.

    Raises:
        OSError: `source` cannot be read, or `target` exists or cannot be made.
    """
    made = False
    with open(source, "rb") as read, open(target, "xb") as write:
        try:
            with contextlib.suppress(OSError):  # a real one comes again when it is copied
                fcntl.ioctl(write.fileno(), getattr(fcntl, "FICLONE", _FICLONE), read.fileno())
                made = True
        finally:
            if not made:
                os.unlink(target)
    return made
