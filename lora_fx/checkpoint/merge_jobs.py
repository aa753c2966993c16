"""The jobs of a merge's threads, and their order."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from lora_fx.checkpoint.fold_stats import Stats
from lora_fx.files.copying import copy_range, preallocate

Done = tuple[int, str, Stats | None]
"""The result of a job: bytes written, the tensor, and the statistics of its change."""


Job = Callable[[], Done]


def in_turn(files: Iterable[Iterator[Job]], width: int) -> Iterator[Job]:
    """The jobs of `width` files at a time, in turn: who writes one file waits for who does too."""
    waiting = iter(files)
    open_files = deque(itertools.islice(waiting, width))
    while open_files:
        jobs = open_files.popleft()
        job = next(jobs, None)
        if job is None:
            open_files.extend(itertools.islice(waiting, 1))
        else:
            open_files.append(jobs)
            yield job


def flushed(fds: Iterable[int]) -> None:
    """Send written data to the disk early, where the system can; the merge's end syncs it all."""
    if hasattr(os, "fdatasync"):
        for fd in fds:
            os.fdatasync(fd)


def reserved(fd: int, size: int) -> Done:
    """Take the bytes of a new file from the disk; OSError where it is full."""
    preallocate(fd, size)
    return 0, "", None


def copied(source: int, target: int, start: int, at: int, count: int) -> Done:
    """Copy `count` bytes from `start` of one file to `at` of another."""
    copy_range(source, target, start, at, count)
    return count, "", None
