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
    copied = _copy_in_kernel(source, target, source_at, target_at, count)
    # sendfile was no faster than this between two file systems, and threads took turns at it
    chunk = memoryview(bytearray(min(CHUNK, count - copied)))
    while copied < count:
        data = chunk[: count - copied]
        read_into(source, data, source_at + copied)
        write_at(target, data, target_at + copied)
        copied += len(data)


def _copy_in_kernel(source: int, target: int, source_at: int, target_at: int, count: int) -> int:
    """Copy by copy_file_range; returns how many bytes it copied before it could not."""
    copied = 0
    if not hasattr(os, "copy_file_range"):
        return copied
    while copied < count:
        n_asked = min(count - copied, _CALL)
        try:
            n_bytes = os.copy_file_range(
                source, target, n_asked, source_at + copied, target_at + copied
            )
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            return copied
        if n_bytes == 0:  # not supported, or the end: the other way tells which
            return copied
        copied += n_bytes
    return copied


def read_into(fd: int, data: memoryview, at: int) -> None:
    """Fill `data` with the bytes from `at`.

    Raises:
        OSError: The file ends before (without errno), or cannot be read.
    """
    end = at + len(data)
    unfilled = data
    while unfilled:
        position = end - len(unfilled)
        n_bytes = os.preadv(fd, [unfilled], position)
        if n_bytes <= 0:
            raise OSError(f"the file ends at byte {position}, expected {end}")
        unfilled = unfilled[n_bytes:]


def write_at(fd: int, data: bytes | bytearray | memoryview, at: int) -> None:
    """Write all of `data` at `at`, in as many system calls as needed."""
    unwritten = memoryview(data).cast("B")
    while unwritten:
        n_bytes = os.pwrite(fd, unwritten, at)
        if n_bytes <= 0:
            raise OSError(errno.EIO, f"none of the remaining {len(unwritten)} bytes were written")
        unwritten = unwritten[n_bytes:]
        at += n_bytes


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
    is_copy = False
    with open(source, "rb") as read, open(target, "xb") as write:
        try:
            with contextlib.suppress(OSError):  # a real one comes again when it is copied
                fcntl.ioctl(write.fileno(), getattr(fcntl, "FICLONE", _FICLONE), read.fileno())
                is_copy = True
        finally:
            if not is_copy:
                os.unlink(target)
    return is_copy
