"""The one gate for what is read: regular files of a bounded size."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextvars import ContextVar
from io import BufferedReader
from pathlib import Path

from lora_fx.errors import LoraFxError, explain, explained
from lora_fx.files.run_files import note_input, run_of_files

AGAIN = "the file is damaged or cut off: download or write it again"
_LFS = b"version https://git-lfs"
_KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
}  # fmt: skip


_trust: ContextVar[bool] = ContextVar("trust", default=False)


@contextlib.contextmanager
def trusting(on: bool = True) -> Iterator[None]:
    """A block in which pickles are read, by torch's unpickler that runs no code, where it is on."""
    token = _trust.set(on or _trust.get())
    try:
        yield
    finally:
        _trust.reset(token)


def trusted() -> bool:
    """True within a block of `trusting`."""
    return _trust.get()


def open_input(path: str | os.PathLike[str], *, most: int | None = None) -> BufferedReader:
    """A regular file, open for reading.

    Args:
        path: What to open. Links are followed; a pipe or device is not waited for.
        most: The largest size, in bytes; any where None.

    Raises:
        LoraFxError: It is not there, cannot be read, is no regular file, or is larger.
    """
    name = os.fspath(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:
        raise LoraFxError(
            f"{name!r} is not the name of a file: {error}", "is the path right?"
        ) from error
    except OSError as error:
        if os.path.isdir(path):
            raise LoraFxError(f"{name}: a folder, not a regular file", "name the file") from error
        raise explain(error, f"{name}: cannot be read") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = _kind_of_entry(status.st_mode)
            raise LoraFxError(f"{name}: {kind}, not a regular file", "name the file")
        if most is not None and status.st_size > most:
            raise LoraFxError(
                f"{name}: {status.st_size} bytes; expected at most {most}", "is it the right file?"
            )
        run = run_of_files()
        if run is not None:
            note_input(run, path, status)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise


def _kind_of_entry(mode: int) -> str:
    """A name for the kind of a path that is not a regular file, from its st_mode."""
    for is_kind, kind in _KINDS.items():
        if is_kind(mode):
            return kind
    return "no file"


def read_bytes(path: str | os.PathLike[str], *, most: int | None = None) -> bytes:
    """A regular file's content; see open_input. A git-LFS pointer is refused as such."""
    unread = f"{os.fspath(path)}: cannot be read"
    with open_input(path, most=most) as file, explained(unread, itself=True):
        data = file.read()
    refuse_pointer(data, len(data), path)
    return data


def read_text(path: str | os.PathLike[str], *, most: int | None = None) -> str:
    """A regular file's text, which has to be UTF-8; a mark of byte order is left out."""
    data = read_bytes(path, most=most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LoraFxError(
            f"{os.fspath(path)}: line {line} is not UTF-8: {error}", "iconv -t UTF-8 converts it"
        ) from error


def refuse_pointer(data: bytes, size: int, path: str | os.PathLike[str]) -> None:
    """Raise if a file is a git-LFS pointer, from its first bytes."""
    if data.startswith(_LFS):
        raise LoraFxError(
            f"{os.fspath(path)}: a git-LFS pointer ({size} bytes) instead of the real file",
            f"fetch the real files: git -C {Path(path).parent} lfs pull",
        )
