"""The jobs of a merge's threads, and their order."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from lora_fx.checkpoint.fold_stats import Stats
from lora_fx.files.copying import copy_range, preallocate

Done = tuple[int, str, Stats | None]
"""The result of a job: bytes written, the tensor name, and the statistics of its change."""


Job = Callable[[], Done]


def in_turn(files: Iterable[Iterator[Job]], width: int) -> Iterator[Job]:
    """Yield jobs of `width` files at a time, alternating, because writers of one file wait."""
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
    """Ask the system to write data to the disk early; the merge's end syncs everything."""
    if hasattr(os, "fdatasync"):
        for fd in fds:
            os.fdatasync(fd)


def reserved(fd: int, size: int) -> Done:
    """Allocate the bytes of a new file on the disk; raise OSError if the disk is full."""
    preallocate(fd, size)
    return 0, "", None


def copied(source: int, target: int, start: int, at: int, count: int) -> Done:
    """Copy `count` bytes from offset `start` of one file to offset `at` of another."""
    copy_range(source, target, start, at, count)
    return count, "", None
