"""The execution of a plan: stream a checkpoint into a new one.

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
from lora_fx.checkpoint.provenance import METADATA
from lora_fx.checkpoint.requantise import joined, ranges, recoded
from lora_fx.checkpoint.stored_rows import Space, read_rows
from lora_fx.checkpoint.tensor_change import TensorChange
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.files.copying import copy_range, reflink, write_at
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.quantised.quantised_weight import Written
from lora_fx.probe.probe import PROPERTY

CHUNK = 64 << 20
"""The number of bytes in one copy job."""
RUN = 4
"""The number of blocks in one fold job."""
RUN_OF_CODES = 8
"""The blocks in one fold job of codes: more, since few rows of column-wise codes read slowly."""
FLUSH = 128 << 20
"""The number of written bytes after which they are flushed to the disk."""
WAITING = 16
"""The number of prepared jobs for each thread; all jobs of a large checkpoint need much memory."""
Progress = Callable[[int, int], None]
"""A function that is called with the bytes done and the total bytes."""


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
    is_folder = plan.base.path.is_dir()
    texts = {METADATA: plan.record()}
    probe, _ = plan.probe()
    if is_folder:
        stage.mkdir()
    touched: list[Shard] = []
    untouched: dict[str, Path] = {}
    for name in plan.base.shards:
        target = stage / name if is_folder else stage
        # the probe goes into the first file that is written
        more = {PROPERTY: probe} if probe is not None and not touched else {}
        shard = lay_out(plan, name, target, {**texts, **more})
        if shard is None:
            untouched[name] = target
        else:
            touched.append(shard)

    run = _Run(plan, threads, progress)
    with run.open_files:
        stats = run.go(touched, untouched, link=link)
    if is_folder:
        copy_companions(plan, stage)
        write_index(plan, stage)
    return stats


def _no_progress(done: int, total: int) -> None:
    """A Progress that shows nothing."""


class _Run:
    """A running merge: open files, threads, bytes done.

    Attributes:
        open_files: Closes every file at the end.
        reserving: The first of all jobs, so that a full disk shows at once.
        copied_heads: (source, target, bytes) of the headers of copied files, which come last.
        targets: The files that are written.
        places: Tensor that changes → its file, and the offset of its bytes there.
    """

    def __init__(self, plan: MergePlan, threads: int, progress: Progress | None) -> None:
        self.plan = plan
        self.threads = max(1, threads)
        self.progress = progress or _no_progress
        self.bytes_done = 0
        self.bytes_in_all = 1
        self.open_files = contextlib.ExitStack()
        self.spaces = threading.local()
        self.sources: dict[Path, int] = {}
        self.targets: list[int] = []
        self.reserving: list[Job] = []
        self.copied_heads: list[tuple[int, int, int]] = []
        self.places: dict[str, tuple[int, int]] = {}
        self.bytes_flushed = 0
        self.flush = Future[None]()
        self.flush.set_result(None)

    def go(
        self, touched: list[Shard], untouched: dict[str, Path], *, link: bool
    ) -> dict[str, Stats]:
        """Create files of their full size, let the threads fill them, and write their headers.

        Args:
            touched: Files in which something changes.
            untouched: Name of each other shard → its copy.
            link: See write.
        """
        copies = [self._copies(name, path, link=link) for name, path in untouched.items()]
        files = [(shard, self._create(shard.target, shard.size)) for shard in touched]
        for shard, fd in files:
            for slot in shard.slots:
                if slot.change is not None:
                    self.places[slot.name] = (fd, len(shard.head) + slot.start)
        self.bytes_in_all = sum(shard.size for shard in touched)
        for name in untouched:
            self.bytes_in_all += (self.plan.base.folder / name).stat().st_size

        folds = [self._jobs(shard, fd) for shard, fd in files]
        jobs = itertools.chain(self.reserving, in_turn([*folds, *copies], self.threads))
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

        for shard, fd in files:
            write_at(fd, shard.head, 0)
        for source, target, size in self.copied_heads:
            copy_range(source, target, 0, 0, size)
        self.progress(self.bytes_in_all, self.bytes_in_all)
        return stats

    def _work(
        self, pool: ThreadPoolExecutor, disk: ThreadPoolExecutor, jobs: Iterable[Job]
    ) -> dict[str, Stats]:
        """Run the jobs; add up statistics in job order, so that two runs report the same."""
        stats: dict[str, Stats] = {}
        waiting: deque[Future[Done]] = deque()
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) >= WAITING * self.threads:
                self._finish(waiting.popleft(), disk, stats)
        while waiting:
            self._finish(waiting.popleft(), disk, stats)
        self.flush.result()
        return stats

    def _finish(self, job: Future[Done], disk: ThreadPoolExecutor, stats: dict[str, Stats]) -> None:
        """Wait for a job, add its result to the totals, and flush once enough was written."""
        count, name, block_stats = job.result()
        if block_stats is not None:
            stats.setdefault(name, Stats()).add(block_stats)
        self.bytes_done += count
        if self.bytes_done - self.bytes_flushed >= FLUSH and self.flush.done():
            self.flush.result()  # an error is said once: later calls would not say it again
            self.bytes_flushed = self.bytes_done
            self.flush = disk.submit(flushed, self.targets)
        self.progress(self.bytes_done, self.bytes_in_all)

    def _create(self, path: Path, size: int) -> int:
        """Create a file of its full size; return its descriptor."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self.open_files.callback(os.close, fd)
        os.ftruncate(fd, size)
        self.targets.append(fd)
        self.reserving.append(partial(reserved, fd, size))
        return fd

    def _open(self, path: Path) -> int:
        """Open a file of the base, once; return its descriptor."""
        if path not in self.sources:
            fd = os.open(path, os.O_RDONLY)
            self.open_files.callback(os.close, fd)
            self.sources[path] = fd
        return self.sources[path]

    def _copies(self, name: str, target: Path, *, link: bool) -> Iterator[Job]:
        """Return jobs that copy a whole shard; none if it can be linked or cloned at once."""
        path = self.plan.base.folder / name
        head = self.plan.base.shards[name].data
        target.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        if link:
            hard_link(path, target)
            return iter(())
        if reflink(path, target):
            return iter(())
        source = self._open(path)
        copy = self._create(target, size)
        self.copied_heads.append((source, copy, head))
        return _copy_jobs(source, copy, head, head, size - head)

    def _jobs(self, shard: Shard, fd: int) -> Iterator[Job]:
        """Yield a shard's jobs: folds first since they take longest, then untouched tensors."""
        for slot in shard.slots:
            if slot.change is not None:
                yield from self._fold_jobs(slot.change)
        for run in untouched_runs(shard.slots):
            first = run[0]
            source = self._open(first.source.file)
            start = len(shard.head) + first.start
            count = run[-1].stop - first.start
            yield from _copy_jobs(source, fd, first.source.start, start, count)

    def _fold_jobs(self, change: TensorChange) -> Iterator[Job]:
        """Yield the jobs that write one changed tensor."""
        if change.scales_of:
            return  # written with the codes
        if change.fold is None:
            yield partial(self._replace, change)
            return
        fold = prepared(change.fold, change.weight)
        self._open(change.source.file)
        blocks = RUN_OF_CODES if isinstance(change.weight, CodesInfo) else RUN
        work = self._fold if change.codes is None else self._recode
        for low, high in change.spans(fold.matrix.rows_per_block * blocks):
            yield partial(work, change, fold, low, high)

    def _replace(self, change: TensorChange) -> Done:
        """Write a tensor that is replaced as a whole."""
        assert change.value is not None
        fd, start = self.places[change.name]
        value = np.atleast_1d(change.value).astype(numpy_dtype(change.dtype))
        write_at(fd, _bytes(value), start)
        return change.nbytes, change.name, None

    def _fold(self, change: TensorChange, fold: TensorFold, low: int, high: int) -> Done:
        """Fold rows low ≤ i < high, block by block, and write them."""
        fd, start = self.places[change.name]
        info = change.source
        columns = fold.matrix.columns
        row_bytes = numpy_dtype(change.dtype).itemsize * columns
        step = fold.matrix.rows_per_block
        space = self._space
        read: Callable[[int, int], Array]
        if isinstance(info, CodesInfo):
            read = info.weight.window(low, high)
        else:
            source = self.sources[info.file]
            read = partial(read_rows, source, info, columns=columns, space=space)
        stats = Stats()
        for first in range(low, high, step):
            stored = read(first, min(high, first + step))
            rows, block_stats = fold.block(stored, first, change.dtype, space)
            write_at(fd, _bytes(rows), start + first * row_bytes)
            stats.add(block_stats)
        return (high - low) * row_bytes, change.name, stats

    @property
    def _space(self) -> Space:
        """The calling thread's reusable arrays."""
        space: Space = self.spaces.__dict__.setdefault("space", Space())
        return space

    def _recode(self, change: TensorChange, fold: TensorFold, low: int, high: int) -> Done:
        """Requantise rows; write their codes, and their scales if the format has new ones."""
        assert change.codes is not None
        weight = change.codes.weight
        codes = weight.read(slice(low, high))
        stats = Stats()
        parts: list[Written] = []
        for first, behind_last in weight.spans(fold.matrix.rows_per_block, low, high):
            block = codes.cut(slice(first - low, behind_last - low))
            rows = slice(first, behind_last)
            block_stats, block_parts = recoded(weight, block, fold, rows, self._space)
            stats.add(block_stats)
            parts += block_parts

        count = 0
        for part in joined(parts):
            fd, start = self.places[part.name]
            count += part.data.nbytes
            for offset, data in ranges(part, self.plan.base.tensors[part.name]):
                write_at(fd, data, start + offset)
        return count, change.name, stats


def _copy_jobs(source: int, target: int, start: int, to: int, count: int) -> Iterator[Job]:
    """Yield jobs that copy `count` bytes from `start` of one file to `to` of another."""
    for offset in range(0, count, CHUNK):
        size = min(CHUNK, count - offset)
        yield partial(copied, source, target, start + offset, to + offset, size)


def _bytes(array: Array) -> memoryview:
    """Return the bytes of an array in order; numpy's buffers do not support bf16."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
