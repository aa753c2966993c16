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

from lora_fx.checkpoint.companions import copy_companions, hard_link, write_index
from lora_fx.checkpoint.fold import TensorFold, one_blas_thread, prepared
from lora_fx.checkpoint.fold_stats import Stats
from lora_fx.checkpoint.merge_jobs import Done, Job, copied, flushed, in_turn, reserved
from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.checkpoint.output_shards import Shard, lay_out, untouched_runs
from lora_fx.checkpoint.requantise import joined, ranges, recoded
from lora_fx.checkpoint.stored_rows import Space, read_rows
from lora_fx.checkpoint.tensor_change import TensorChange
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.files.copying import copy_range, reflink, write_at
from lora_fx.files.quantised.dequantise import CodesInfo

CHUNK = 64 << 20
"""Bytes of one copy job."""
RUN = 4
"""Blocks of one fold job."""
RUN_OF_CODES = 8
"""The same of codes, which may lie by columns: few rows of them are many short reads."""
FLUSH = 128 << 20
"""Bytes after which what is written is sent to the disk, while more is folded."""
WAITING = 16
"""Jobs a thread that are made ahead: all jobs of a large checkpoint would take memory."""
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def write(
    plan: MergePlan, stage: Path, *, threads: int, link: bool, progress: Progress | None
) -> dict[str, Stats]:
    """Write the merged checkpoint.

    Args:
        plan: What to write.
        stage: A path that does not exist: becomes a file where the base is one, else a folder.
        threads: How many work at a time.
        link: Give untouched shards the base's inodes (hard links) instead of copies.
        progress: See Progress.

    Returns:
        What the fold did, by tensor.

    Raises:
        LoraFxError: A value that a tensor cannot hold.
        OSError: The disk is full, a file cannot be read …
    """
    is_folder, text = plan.base.path.is_dir(), plan.record()
    if is_folder:
        stage.mkdir()
    touched: list[Shard] = []
    rest: dict[str, Path] = {}
    for name in plan.base.shards:
        target = stage / name if is_folder else stage
        shard = lay_out(plan, name, target, text)
        if shard is None:
            rest[name] = target
        else:
            touched.append(shard)
    run = _Run(plan, threads, progress)
    with run.stack:
        stats = run.go(touched, rest, link=link)
    if is_folder:
        copy_companions(plan, stage)
        write_index(plan, stage)
    return stats


class _Run:
    """One merge under way: open files, threads, bytes done."""

    def __init__(self, plan: MergePlan, threads: int, progress: Progress | None) -> None:
        self.plan, self.stack, self.threads = plan, contextlib.ExitStack(), max(1, threads)
        self.progress, self.done, self.total = progress or (lambda done, total: None), 0, 1
        self.spaces = threading.local()
        self.sources: dict[Path, int] = {}
        self.reserved: list[Job] = []  # first of all jobs: a full disk shows at once
        self.heads: list[tuple[int, int, int]] = []  # (source, target, bytes) of copied files
        self.made: list[int] = []
        self.flushed, self.flush = 0, Future[None]()
        self.flush.set_result(None)
        self.places: dict[str, tuple[int, int]] = {}  # (target, offset) of what changes

    def go(self, touched: list[Shard], rest: dict[str, Path], *, link: bool) -> dict[str, Stats]:
        """Files are made at their full size, filled by the threads, and get their headers.

        Args:
            touched: Files in which something changes.
            rest: Name of each other shard → its copy.
            link: See write.
        """
        copies = [self._copies(name, path, link=link) for name, path in rest.items()]
        fds = [(shard, self._create(shard.target, shard.size)) for shard in touched]
        folds = [self._jobs(shard, fd) for shard, fd in fds]
        changed = ((s, shard, fd) for shard, fd in fds for s in shard.slots if s.change is not None)
        self.places = {s.name: (fd, len(shard.head) + s.start) for s, shard, fd in changed}
        jobs = itertools.chain(self.reserved, in_turn([*folds, *copies], self.threads))
        self.total = sum(s.size for s in touched)
        self.total += sum((self.plan.base.folder / n).stat().st_size for n in rest)
        with (
            one_blas_thread(),
            ThreadPoolExecutor(1) as disk,
            ThreadPoolExecutor(self.threads) as pool,
        ):
            try:
                stats = self._work(pool, disk, jobs)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        for shard, fd in fds:
            write_at(fd, shard.head, 0)
        for source, target, size in self.heads:
            copy_range(source, target, 0, 0, size)
        self.progress(self.total, self.total)
        return stats

    def _work(
        self, pool: ThreadPoolExecutor, disk: ThreadPoolExecutor, jobs: Iterable[Job]
    ) -> dict[str, Stats]:
        """Run the jobs; sums are added up in their order, so that two runs report the same."""
        stats: dict[str, Stats] = {}
        waiting: deque[Future[Done]] = deque()
        for job in itertools.chain(jobs, itertools.repeat(None)):
            if job is not None:
                waiting.append(pool.submit(job))
                if len(waiting) < WAITING * self.threads:
                    continue
            if not waiting:
                self.flush.result()
                break
            count, name, found = waiting.popleft().result()
            if found is not None:
                stats.setdefault(name, Stats()).add(found)
            self.done += count
            if self.done - self.flushed >= FLUSH and self.flush.done():
                self.flush.result()  # an error is said once: later calls would not say it again
                self.flushed, self.flush = self.done, disk.submit(flushed, self.made)
            self.progress(self.done, self.total)
        return stats

    def _create(self, path: Path, size: int) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self.stack.callback(os.close, fd)
        os.ftruncate(fd, size)
        self.made.append(fd)
        self.reserved.append(partial(reserved, fd, size))
        return fd

    def _open(self, path: Path) -> int:
        if path not in self.sources:
            fd = os.open(path, os.O_RDONLY)
            self.stack.callback(os.close, fd)
            self.sources[path] = fd
        return self.sources[path]

    def _copies(self, name: str, target: Path, *, link: bool) -> Iterator[Job]:
        """Jobs that copy a whole shard, in the cheapest way there is; the file is made at once."""
        source, head = self.plan.base.folder / name, self.plan.base.shards[name].data
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

            yield partial(copied, source, target, start + i, at + i, n)

    def _jobs(self, shard: Shard, fd: int) -> Iterator[Job]:
        """Fold jobs first, since they take longest; runs of untouched tensors as one range."""
        lead = len(shard.head)
        for slot in shard.slots:
            if slot.change is not None:
                yield from self._fold(slot.change)
        for run in untouched_runs(shard.slots):
            start, count = run[0].source.start, run[-1].stop - run[0].start
            source = self._open(run[0].source.file)
            yield from self._range(source, fd, start, lead + run[0].start, count)

    def _fold(self, change: TensorChange) -> Iterator[Job]:
        if change.scales_of:
            return  # written with the codes
        if change.fold is None:
            yield partial(self._replace, change)
            return
        fold = prepared(change.fold, change.weight)
        self._open(change.source.file)
        run = RUN_OF_CODES if isinstance(change.weight, CodesInfo) else RUN
        work = self._rows if change.codes is None else self._recoded
        for low, high in change.spans(fold.matrix.rows_per_block * run):
            yield partial(work, change, fold, low, high)

    def _replace(self, change: TensorChange) -> Done:
        assert change.value is not None
        fd, at = self.places[change.name]
        value = np.atleast_1d(change.value).astype(numpy_dtype(change.dtype))
        write_at(fd, _bytes(value), at)
        return change.nbytes, change.name, None

    def _rows(self, change: TensorChange, fold: TensorFold, low: int, high: int) -> Done:
        (fd, at), info = self.places[change.name], change.source
        stats, columns = Stats(), fold.matrix.columns
        row = numpy_dtype(change.dtype).itemsize * columns
        step = fold.matrix.rows_per_block
        read: Callable[[int, int], Array]
        read = partial(read_rows, self.sources[info.file], info, columns=columns, space=self._space)
        if isinstance(info, CodesInfo):
            read = info.weight.window(low, high)
        for start in range(low, high, step):
            old = read(start, min(high, start + step))
            new, found = fold.block(old, start, change.dtype, self._space)
            write_at(fd, _bytes(new), at + start * row)
            stats.add(found)
        return (high - low) * row, change.name, stats

    @property
    def _space(self) -> Space:
        """The calling thread's."""
        space: Space = self.spaces.__dict__.setdefault("space", Space())
        return space

    def _recoded(self, change: TensorChange, fold: TensorFold, low: int, high: int) -> Done:
        """Codes of rows made anew, and their scales where the format makes new ones."""
        assert change.codes is not None
        stats, count, weight = Stats(), 0, change.codes.weight
        q, every = weight.read(slice(low, high)), []
        for start, stop in weight.spans(fold.matrix.rows_per_block, low, high):
            here = q.cut(slice(start - low, stop - low))
            found, parts = recoded(weight, here, fold, slice(start, stop), self._space)
            stats.add(found)
            every += parts
        for part in joined(every):
            fd, at = self.places[part.name]
            count += part.data.nbytes
            for offset, data in ranges(part, self.plan.base.tensors[part.name]):
                write_at(fd, data, at + offset)
        return count, change.name, stats


def _bytes(array: Array) -> memoryview:
    """The bytes of an array in order; numpy's own buffers do not know bf16."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
