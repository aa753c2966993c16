"""Copies between descriptors, with and without the calls that a system may lack."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_fx.files import copying
from lora_fx.files.copying import copy_range, preallocate, reflink, write_at
from tests.faults import Faults

DATA = os.urandom(3 << 20)
FALLS = [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM]
KERNEL = ("copy_file_range",)


@contextmanager
def files(folder: Path, size: int = len(DATA)) -> Iterator[tuple[int, int]]:
    folder.mkdir(exist_ok=True)
    (folder / "source").write_bytes(DATA[:size])
    source = os.open(folder / "source", os.O_RDONLY)
    target = os.open(folder / "target", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        yield source, target
    finally:
        os.close(source)
        os.close(target)


def check_copy(folder: Path) -> None:
    """An unaligned range of 2 MB into the middle, and an empty one; positions stay."""
    with files(folder) as (source, target):
        os.write(target, b"x" * 20)
        copy_range(source, target, 7, 11, 2 << 20)
        copy_range(source, target, 0, 0, 0)
        assert os.lseek(target, 0, os.SEEK_CUR) == 20
    want = b"x" * 11 + DATA[7 : 7 + (2 << 20)]
    assert (folder / "target").read_bytes() == want


@pytest.mark.parametrize("gone", [(), KERNEL])
def test_without_the_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: tuple[str, ...]
) -> None:
    for name in gone:
        monkeypatch.delattr(os, name, raising=False)
    with Faults() as seen:
        check_copy(tmp_path)
    assert not set(gone) & set(seen.calls)
    if hasattr(os, "copy_file_range"):
        assert ("preadv" in seen.calls) == bool(gone)


def refuse(code: int, then: Callable[..., int] | None = None, after: int = 0) -> Any:
    """A call that works `after` times and then fails."""
    calls = []

    def call(*args: Any) -> int:
        calls.append(args)
        if then is not None and len(calls) <= after:
            return then(*args)
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", FALLS)
def test_a_call_that_does_not_apply_falls_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "copy_file_range", refuse(code), raising=False)
    check_copy(tmp_path)


def test_falls_through_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_CALL", 100_000)
    late = refuse(errno.EXDEV, os.copy_file_range, 3)
    monkeypatch.setattr(os, "copy_file_range", late)
    with Faults() as seen:
        check_copy(tmp_path)
    assert seen.calls.count("copy_file_range") == 4 and "preadv" in seen.calls


@pytest.mark.parametrize("name", ["copy_file_range", "preadv", "pwrite"])
def test_short_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = getattr(os, name)
    count = {"copy_file_range": 2, "preadv": 1, "pwrite": 1}[name]

    def short(*args: Any) -> Any:
        part = args[count]
        if name == "preadv":
            part = [part[0][:1001]]
        else:
            part = part[:1000] if name == "pwrite" else min(part, 1001)
        return real(*args[:count], part, *args[count + 1 :])

    if name != "copy_file_range":
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSYS))
    monkeypatch.setattr(os, name, short)
    check_copy(tmp_path)


@pytest.mark.parametrize("name", ["copy_file_range", "preadv", "pwrite"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_real_errors_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSYS))
    monkeypatch.setattr(os, name, refuse(code))
    with pytest.raises(OSError, match=os.strerror(code)), files(tmp_path) as (source, target):
        copy_range(source, target, 0, 0, 100)


@pytest.mark.parametrize("gone", [(), KERNEL])
def test_a_source_that_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: tuple[str, ...]
) -> None:
    for name in gone:
        monkeypatch.setattr(os, name, refuse(errno.ENOSYS))
    with files(tmp_path, 1000) as (source, target):
        with pytest.raises(OSError, match="ends at byte 1000, expected 1050") as caught:
            copy_range(source, target, 50, 0, 1000)
        assert caught.value.errno is None
        copy_range(source, target, 5000, 0, 0)


def test_a_call_that_writes_nothing_does_not_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with (
        pytest.raises(OSError, match="none of the remaining 1 bytes were written"),
        files(tmp_path) as (_, target),
    ):
        write_at(target, b"1", 0)


def test_between_file_systems(tmp_path: Path) -> None:
    """EXDEV where the kernel says so, as for ext4 to tmpfs."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    other = memory / f"lora-fx-test-{os.getpid()}"
    try:
        with files(tmp_path) as (source, _), other.open("wb") as target:
            copy_range(source, target.fileno(), 7, 0, 2 << 20)
        assert other.read_bytes() == DATA[7 : 7 + (2 << 20)]
    finally:
        other.unlink(missing_ok=True)


@pytest.mark.parametrize("gone", [(), KERNEL])
def test_threads_share_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: tuple[str, ...]
) -> None:
    for name in gone:
        monkeypatch.setattr(os, name, refuse(errno.ENOSYS))
    monkeypatch.setattr(copying, "_CALL", 5000)
    monkeypatch.setattr(copying, "CHUNK", 5000)
    part = len(DATA) // 8
    with files(tmp_path) as (source, target):
        preallocate(target, len(DATA))
        args = [(source, target, i * part, i * part, part) for i in range(8)]
        threads = [threading.Thread(target=copy_range, args=a) for a in args]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (tmp_path / "target").read_bytes() == DATA


# --- space ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_preallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for step in ("as it is", "unsupported", "gone"):
        if step == "unsupported":
            monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP))
        elif step == "gone":
            monkeypatch.delattr(os, "posix_fallocate")
        with files(tmp_path) as (_, target):
            preallocate(target, size)
            found = os.fstat(target)
        assert found.st_size == size
        assert step != "as it is" or found.st_blocks * 512 >= size, "reserved, not only named"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_preallocate_says_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse(code))
    with pytest.raises(OSError, match=os.strerror(code)), files(tmp_path) as (_, target):
        preallocate(target, 10)


# --- reflinks ------------------------------------------------------------------------------------


def test_reflink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"data")
    if reflink(source, target):  # btrfs, xfs
        assert target.read_bytes() == b"data"
    else:
        assert not target.exists()
    target.unlink(missing_ok=True)

    def clone(write: int, request: int, read: int) -> None:
        assert request == 0x40049409
        os.write(write, os.read(read, 10))

    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert reflink(source, target) and target.read_bytes() == b"data"
    with pytest.raises(FileExistsError):
        reflink(source, target)
    assert target.read_bytes() == b"data" and source.read_bytes() == b"data"
    with pytest.raises(FileNotFoundError):
        reflink(tmp_path / "gone", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "no"), OSError(errno.EIO, "torn")])
def test_reflink_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    (tmp_path / "source").write_bytes(b"data")

    def torn(write: int, *_: int) -> None:
        os.write(write, b"da")
        raise error

    monkeypatch.setattr(fcntl, "ioctl", torn)
    assert not reflink(tmp_path / "source", tmp_path / "target")
    assert os.listdir(tmp_path) == ["source"]
