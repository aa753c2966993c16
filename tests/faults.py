"""I/O that fails on purpose: count the I/O calls of a block, and let the n-th one fail.

    with Faults() as seen:                        # seen.calls: every call, in order
        work()
    with Faults(3, errno.ENOSPC, only=WRITES):    # the third of these raises OSError(ENOSPC)
        work()

Counted are the functions of `os` that touch files, `open`, and what is written through its
files; calls from C (numpy's tofile, Rust) are not.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Self

WRITES = frozenset(
    ("open", "write", "writev", "pwrite", "pwritev", "ftruncate", "truncate", "posix_fallocate",
     "copy_file_range", "sendfile", "fsync", "fdatasync", "rename", "replace", "link", "symlink",
     "mkdir", "chmod", "fchmod", "utime")
)  # fmt: skip
"""What a full or read-only disk can refuse; `open` for reading too, as one name."""

CALLS = WRITES | frozenset(
    ("close", "read", "readv", "pread", "preadv", "stat", "lstat", "fstat", "listdir", "scandir",
     "lseek", "statvfs", "unlink", "remove", "rmdir", "readlink")
)  # fmt: skip

_close = os.close

Failure = int | type[BaseException] | signal.Signals


class Faults:
    """Count I/O calls while entered, and fail one.

    Args:
        at: Which call fails, from 1; 0 for none.
        error: An errno; an exception class (KeyboardInterrupt); a signal, sent to this process.
        only: Names that count.
        late: The call does its work first, as when Ctrl-C comes just after it.
        stay: All later calls fail too: a disk that died.
    """

    def __init__(
        self,
        at: int = 0,
        error: Failure = 5,
        *,
        only: Collection[str] = CALLS,
        late: bool = False,
        stay: bool = False,
    ) -> None:
        self.at, self.error, self.only, self.late, self.stay = at, error, only, late, stay
        self.calls: list[str] = []
        self._lock = threading.Lock()
        self._old: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for name in sorted(self.only):
            if hasattr(os, name):
                self._patch(os, name, self._counted(name, getattr(os, name)))
        opened = functools.partial(_open, self)
        self._patch(io, "open", opened)
        self._patch(builtins, "open", opened)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, value in reversed(self._old):
            setattr(owner, name, value)

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._old.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.run(name, lambda: real(*args, **kwargs))

        return call

    def run(self, name: str, real: Callable[[], Any]) -> Any:
        """The call, or its failure. A close that fails has closed, as in Linux."""
        with self._lock:
            self.calls.append(name)
            n = len(self.calls)
        if not self.at or n < self.at or (n > self.at and not self.stay):
            return real()
        if self.late or name == "close":
            with contextlib.suppress(OSError):
                lost = real()
                if name in ("open", "scandir"):  # nobody else can close it any more
                    _close(lost) if isinstance(lost, int) else lost.close()
        if isinstance(self.error, signal.Signals):
            os.kill(os.getpid(), self.error)
            signal.pause()
        if isinstance(self.error, int):
            raise OSError(self.error, os.strerror(self.error))
        raise self.error


class _File(io.FileIO):
    """What `open` stands on, with its writes counted."""

    faults: Faults

    def write(self, data: Any) -> int:
        if "write" not in self.faults.only:
            return super().write(data)
        put = super().write
        return int(self.faults.run("write", lambda: put(data)))


def _open(
    faults: Faults, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
    errors: str | None = None, newline: str | None = None, closefd: bool = True, opener: Any = None,
) -> Any:  # fmt: skip
    """`open`, built from the parts that it is made of."""

    def made() -> _File:
        return _File(file, mode.replace("b", "").replace("t", ""), closefd, opener)

    raw = faults.run("open", made) if "open" in faults.only else made()
    raw.faults = faults
    if buffering == 0:
        return raw
    kind: Any = io.BufferedRandom if "+" in mode else io.BufferedReader
    buffered = kind(raw) if "+" in mode or "r" in mode else io.BufferedWriter(raw)
    if "b" in mode:
        return buffered
    return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, buffering == 1)


@dataclass(frozen=True)
class Case:
    """One run with one fault: the call that failed, and how the run ended."""

    at: int
    call: str
    raised: BaseException | None

    def __str__(self) -> str:
        return f"fault at call {self.at}, {self.call}: {self.raised!r}"


def each_fault(
    prepare: Callable[[], object],
    work: Callable[[], object],
    error: Failure,
    **options: Any,
) -> Iterator[Case]:
    """Run `work` once for each of its I/O calls, with a fault there; the caller looks after each.

    Args:
        prepare: Puts everything back before each run.
        work: What is tested.
        error: As in Faults.
        options: As in Faults.
    """
    prepare()
    work()  # what is imported or looked up once a process is not counted
    prepare()
    with Faults(**{k: v for k, v in options.items() if k == "only"}) as seen:
        work()
    # One more than there are calls: the last run has no fault, so the count was right.
    for at in range(1, len(seen.calls) + 2):
        prepare()
        raised: BaseException | None = None
        with Faults(at, error, **options) as faults:
            try:
                work()
            except BaseException as e:
                raised = e
        call = faults.calls[at - 1] if at <= len(faults.calls) else "none"
        assert (call == "none") == (at > len(seen.calls)), "the calls change from run to run"
        yield Case(at, call, raised)
