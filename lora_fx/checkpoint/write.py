"""Carry out a plan: stream a checkpoint into a new one.

Untouched byte ranges are copied by the kernel; touched tensors are folded block by block by
worker threads, each with one block of memory. In every file the data comes first and the header
last, so that a torn file never opens; the index comes after all files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from lora_fx.checkpoint.beside import copy_companions, hard_link, write_index
from lora_fx.checkpoint.blocks import Fold, Space, Stats, one_blas_thread, rows_per_block
from lora_fx.checkpoint.copying import copy_range, preallocate, reflink, write_at
from lora_fx.checkpoint.plan import Change, Plan
from lora_fx.checkpoint.provenance import record
from lora_fx.checkpoint.rows import prepared, read_rows
from lora_fx.checkpoint.shards import Shard, Slot, lay_out
from lora_fx.checkpoint.strict import Header
from lora_fx.lowrank import Array
from lora_fx.numeric import numpy_dtype

CHUNK = 64 << 20
"""Bytes of one copy job."""
RUN = 4
"""Blocks of one fold job."""
FLUSH = 128 << 20
"""Bytes after which what is written is sent to the disk, while more is folded."""
WAITING = 16
"""Jobs a thread that are made ahead: all jobs of a large checkpoint would take memory."""
Done = tuple[int, str, Stats | None]
"""What a job says: bytes written, the tensor, what changed in it."""
Job = Callable[[], Done]
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def write(
    plan: Plan, stage: Path, *, workers: int, link: bool = False, progress: Progress | None = None
) -> dict[str, Stats]:
    """Write the merged checkpoint.

    Args:
        plan: What to write.
        stage: A path that does not exist: becomes a file where the base is one, else a folder.
        workers: Threads.
        link: Give untouched shards the base's inodes (hard links) instead of copies.
        progress: See Progress.

    Returns:
        What the fold did, by tensor.

    Raises:
        LoraFxError: A value that a tensor cannot hold.
        OSError: The disk is full, a file cannot be read …
    """
    folder = stage if plan.base.path.is_dir() else stage.parent
    if plan.base.path.is_dir():
        stage.mkdir()
    text = recorded(plan)
    single = not plan.base.path.is_dir()
    touched: list[Shard] = []
    rest: list[tuple[Header, str, Path]] = []
    for name, header in plan.base.shards.items():
        target = stage if single else folder / name
        shard = lay_out(plan, plan.base.folder / name, target, name, header, text)
        if shard is None:
            rest.append((header, name, target))
        else:
            touched.append(shard)
    stats: dict[str, Stats] = {}
    with contextlib.ExitStack() as stack:
        _Run(plan, stack, workers, progress).go(touched, rest, stats, link=link)
    if plan.base.path.is_dir():
        copy_companions(plan, folder)
        write_index(plan, folder)
    return stats


def recorded(plan: Plan) -> str:
    """The metadata of the merge that a plan is."""
    return record(
        plan.base,
        [n for n in plan.changes if n not in plan.added],
        [(g.hash, g.weight) for g in plan.given],
        plan.options.dtype,
        plan.recorded,
    )


class _Run:
    """One merge under way: open files, threads, bytes done."""

    def __init__(
        self,
        plan: Plan,
        stack: contextlib.ExitStack,
        workers: int,
        progress: Progress | None,
    ) -> None:
        self.plan, self.stack, self.workers = plan, stack, max(1, workers)
        self.progress, self.done, self.total = progress, 0, 1
        self.spaces = threading.local()
        self.sources: dict[Path, int] = {}
        self.reserved: list[Job] = []  # first of all jobs: a full disk shows at once
        self.heads: list[tuple[int, int, int]] = []  # (source, target, bytes) of copied files
        self.made: list[int] = []
        self.flushed, self.flush = 0, Future[None]()
        self.flush.set_result(None)

    def go(
        self,
        touched: list[Shard],
        rest: list[tuple[Header, str, Path]],
        stats: dict[str, Stats],
        *,
        link: bool,
    ) -> None:
        """Files are made at their full size, filled by the threads, and get their headers."""
        base = self.plan.base.folder
        copies = [self._copies(base / n, path, head.data, link=link) for head, n, path in rest]
        fds = [(shard, self._create(shard.target, shard.size)) for shard in touched]
        folds = [self._jobs(shard, fd) for shard, fd in fds]
        jobs = itertools.chain(self.reserved, _in_turn([*folds, *copies], self.workers))
        self.total = sum(s.size for s in touched) + sum(
            (base / n).stat().st_size for _, n, _ in rest
        )
        with (
            one_blas_thread(),
            ThreadPoolExecutor(1) as disk,
            ThreadPoolExecutor(self.workers) as pool,
        ):
            try:
                self._work(pool, disk, jobs, stats)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        for shard, fd in fds:
            write_at(fd, shard.head, 0)
        for source, target, size in self.heads:
            copy_range(source, target, 0, 0, size)
        if self.progress is not None:
            self.progress(self.total, self.total)

    def _work(
        self,
        pool: ThreadPoolExecutor,
        disk: ThreadPoolExecutor,
        jobs: Iterable[Job],
        stats: dict[str, Stats],
    ) -> None:
        """Run the jobs; sums are added up in their order, so that two runs report the same."""
        waiting: deque[Future[Done]] = deque()
        for job in itertools.chain(jobs, itertools.repeat(None)):
            if job is not None:
                waiting.append(pool.submit(job))
                if len(waiting) < WAITING * self.workers:
                    continue
            if not waiting:
                self.flush.result()
                return
            count, name, found = waiting.popleft().result()
            if found is not None:
                stats.setdefault(name, Stats()).add(found)
            self.done += count
            if self.done - self.flushed >= FLUSH and self.flush.done():
                self.flush.result()  # an error is said once: later calls would not say it again
                self.flushed, self.flush = self.done, disk.submit(_flushed, self.made)
            if self.progress is not None:
                self.progress(self.done, self.total)

    def _create(self, path: Path, size: int) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        self.stack.callback(os.close, fd)
        os.ftruncate(fd, size)
        self.made.append(fd)
        self.reserved.append(partial(_reserved, fd, size))
        return fd

    def _open(self, path: Path) -> int:
        if path not in self.sources:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self.stack.callback(os.close, fd)
            self.sources[path] = fd
        return self.sources[path]

    def _copies(self, source: Path, target: Path, head: int, *, link: bool) -> Iterator[Job]:
        """Jobs that copy a whole file, in the cheapest way there is; the file is made at once."""
        target.parent.mkdir(parents=True, exist_ok=True)
        size = source.stat().st_size
        if link:
            hard_link(source, target)
        elif not reflink(source, target):
            old, new = self._open(source), self._create(target, size)
            self.heads.append((old, new, head))
            return self._range(old, new, head, head, size - head)
        return iter(())

    def _range(self, source: int, target: int, start: int, at: int, count: int) -> Iterator[Job]:
        for i in range(0, count, CHUNK):
            n = min(CHUNK, count - i)

            yield partial(_copied, source, target, start + i, at + i, n)

    def _jobs(self, shard: Shard, fd: int) -> Iterator[Job]:
        """Fold jobs first, since they take longest; runs of untouched tensors as one range."""
        lead = len(shard.head)
        for slot in shard.slots:
            if slot.change is not None:
                yield from self._fold(slot, slot.change, fd, lead)
        source = self._open(shard.source)
        for still, group in itertools.groupby(shard.slots, lambda s: s.change is None):
            run = list(group)
            if still:
                start, count = run[0].source.start, run[-1].stop - run[0].start
                yield from self._range(source, fd, start, lead + run[0].start, count)

    def _fold(self, slot: Slot, change: Change, fd: int, lead: int) -> Iterator[Job]:
        at = lead + slot.start
        if change.fold is None:
            yield partial(self._replace, change, fd, at)
            return
        fold = prepared(change.fold, change.source)
        source = self._open(change.source.file)
        step = rows_per_block(fold.matrix.columns) * RUN
        for low in range(0, fold.matrix.rows, step):
            high = min(fold.matrix.rows, low + step)
            yield partial(self._rows, change, fold, source, fd, at, low, high)

    def _replace(self, change: Change, fd: int, at: int) -> Done:
        assert change.value is not None
        value = np.atleast_1d(change.value).astype(numpy_dtype(change.dtype))
        write_at(fd, _bytes(value), at)
        return change.nbytes, change.name, None

    def _rows(
        self, change: Change, fold: Fold, source: int, fd: int, at: int, low: int, high: int
    ) -> Done:
        stats, columns = Stats(), fold.matrix.columns
        row = numpy_dtype(change.dtype).itemsize * columns
        step = rows_per_block(columns)
        space: Space = self.spaces.__dict__.setdefault("space", Space())
        for start in range(low, high, step):
            n = min(step, high - start)
            old = read_rows(source, change.source, start, n, columns, space)
            new, found = fold.block(old, start, change.dtype, space)
            write_at(fd, _bytes(new), at + start * row)
            stats.add(found)
        return (high - low) * row, change.name, stats


def _in_turn(files: Iterable[Iterator[Job]], width: int) -> Iterator[Job]:
    """The jobs of `width` files at a time, in turn: who writes one file waits for who does too."""
    rest = iter(files)
    open_ = deque(itertools.islice(rest, width))
    while open_:
        jobs = open_.popleft()
        job = next(jobs, None)
        if job is not None:
            open_.append(jobs)
            yield job
        else:
            open_.extend(itertools.islice(rest, 1))


def _flushed(fds: Iterable[int]) -> None:
    """Write to the disk what is not there yet, where the system can; the end syncs everything."""
    if hasattr(os, "fdatasync"):
        for fd in fds:
            os.fdatasync(fd)


def _reserved(fd: int, size: int) -> Done:
    preallocate(fd, size)
    return 0, "", None


def _copied(source: int, target: int, start: int, at: int, count: int) -> Done:
    copy_range(source, target, start, at, count)
    return count, "", None


def _bytes(array: Array) -> memoryview:
    """The bytes of an array in order; numpy's own buffers do not know bf16."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
