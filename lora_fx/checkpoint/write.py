"""Carry out a plan: stream a checkpoint into a new one.

Untouched byte ranges are copied by the kernel; touched tensors are folded block by block by
worker threads, each with one block of memory. In every file the data comes first and the header
last, so that a torn file never opens; the index comes after all files.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lora_fx.checkpoint.fold import Space, Stats, TensorFold, one_blas_thread, prepared, read_rows
from lora_fx.checkpoint.merge_plan import MergePlan, TensorChange
from lora_fx.checkpoint.provenance import METADATA
from lora_fx.checkpoint.requantise import joined, ranges, recoded
from lora_fx.dtypes import DTYPES, Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.copying import copy_range, preallocate, reflink, write_at
from lora_fx.files.permissions import copy_file, keep_mode
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.read import read_bytes
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.strict_json import read_json
from lora_fx.text import Json, JsonView

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
        for run in _runs(shard.slots):
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


# What a merge's threads are given to do, and in which order.


Done = tuple[int, str, Stats | None]
"""What a job says: bytes written, the tensor, what changed in it."""
Job = Callable[[], Done]


def in_turn(files: Iterable[Iterator[Job]], width: int) -> Iterator[Job]:
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


def flushed(fds: Iterable[int]) -> None:
    """Write to the disk what is not there yet, where the system can; the end syncs everything."""
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


# How an output file lies on disk: its header, and where each tensor's bytes go.
#
# Names, their order and the order of the bytes are the base's; new tensors come last.


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of an output file: where it will lie, and what it is made of."""

    name: str
    dtype: str
    start: int
    stop: int
    source: TensorInfo
    change: TensorChange | None


@dataclass(frozen=True)
class Shard:
    """One output file with its header; `slots` in the order of their bytes."""

    target: Path
    head: bytes
    slots: tuple[TensorSlot, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.head) + sum(s.stop - s.start for s in self.slots)


def _runs(slots: Iterable[TensorSlot]) -> Iterator[list[TensorSlot]]:
    """Untouched tensors that lie one behind the other, in what is read as in what is written."""

    def shift(slot: TensorSlot) -> tuple[Path, int] | None:
        return None if slot.change else (slot.source.file, slot.source.start - slot.start)

    for where, run in itertools.groupby(slots, shift):
        if where is not None:
            yield [*run]


def lay_out(plan: MergePlan, name: str, target: Path, text: str) -> Shard | None:
    """The output file of a shard; None where nothing in it changes."""
    header = plan.base.shards[name]
    mine = {
        n: plan.changes[n]
        for n, info in header.tensors.items()
        if n in plan.changes and plan.base.tensors[n] == info
    }
    new = [plan.changes[n] for n, home in plan.added.items() if home == name]
    if not mine and not new and plan.base.of is None:
        return None
    place: dict[str, TensorSlot] = {}
    at = 0
    by_start = sorted(header.tensors.items(), key=lambda n: (n[1].file, n[1].start, n[1].stop))
    old = [(n, info, mine.get(n)) for n, info in by_start]
    for n, info, change in [*old, *((c.name, c.source, c) for c in new)]:
        size = change.nbytes if change else info.stop - info.start
        place[n] = TensorSlot(n, (change or info).dtype, at, at + size, info, change)
        at += size
    # A file without metadata loads in transformers, one without this of its metadata does not.
    metadata = header.metadata or {"format": "pt"}
    entries: Json = {"__metadata__": {**metadata, METADATA: text}}
    for n in (*header.tensors, *(c.name for c in new)):
        s = place[n]
        code, shape = DTYPES[s.dtype].code, list(s.source.shape)
        entries[n] = {"dtype": code, "shape": shape, "data_offsets": [s.start, s.stop]}
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return Shard(target, len(body).to_bytes(8, "little") + body, tuple(place.values()))


# What lies beside a merged checkpoint's shards: companions, the index, links to old shards.


REPORTS = ("report.json", "lora-fx-report.json")
"""Names of what a merge leaves beside its output; the second where the base has its own first."""
_OURS = frozenset(("ok", "warnings", "tensors", "touched_bytes", "base_verified"))
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


def hard_link(source: Path, target: Path) -> None:
    """Give a shard's inode a second name.

    Raises:
        LoraFxError: The file systems cannot.
    """
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise LoraFxError(
            f"{source}: cannot be linked into the output: {error.strerror}",
            "hard links need one file system that has them; leave --link out to copy",
        ) from error


def untied(config: JsonView) -> Json:
    """A config.json that says so."""
    result = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        result["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return result


def copy_companions(plan: MergePlan, folder: Path) -> None:
    """Configs, tokenizer and whatever else belongs to the folder."""
    for name in plan.base.companions()[0]:
        source, target = plan.base.path / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if str(name) == "config.json" and (plan.tie is not None or plan.base.settings is not None):
            config = plan.base.config()
            config = untied(config) if plan.tie is not None else config
            keep_mode(source.stat(), target)
            target.write_bytes((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
        else:
            copy_file(source, target)


def report_name(plan: MergePlan) -> str:
    """The name of the report: the first that is no file of the base's own; empty if both are.

    A report of the merge that made the base is none of its own: it would not fit the output.
    """
    return next((n for n in REPORTS if not _is_file_of_base(plan.base.path / n)), "")


def _is_file_of_base(file: Path) -> bool:
    if not os.path.lexists(file):
        return False
    try:
        return not read_json(file).keys() >= _OURS
    except LoraFxError:
        return True


def write_index(plan: MergePlan, folder: Path) -> None:
    """The index, byte for byte where it still holds, else with its sums and new names.

    Of a view's shards, where there are several, it is new.
    """
    base, index = plan.base, Json()
    if base.of is not None and len(base.shards) > 1:
        homes = {n: shard for shard, header in base.shards.items() for n in header.tensors}
        index = {"metadata": {"total_size": 0}, "weight_map": homes}
        name = f"{next(iter(base.shards)).partition('-0')[0]}.safetensors.index.json"
    elif base.of is None and base.index is not None:
        index, name = read_json(base.index), base.index.name
        if not plan.added and all(c.dtype == c.source.dtype for c in plan.changes.values()):
            (folder / name).write_bytes(read_bytes(base.index))
            return
    if not index:
        return
    index["weight_map"] |= dict(plan.added)
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        sizes = {n: t.stop - t.start for n, t in base.tensors.items()}
        sizes |= {n: c.nbytes for n, c in plan.changes.items()}
        metadata["total_size"] = sum(sizes.values())
    if isinstance(metadata, dict) and isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(math.prod(plan.changes[n].shape) for n in plan.added)
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (folder / name).write_text(text, encoding="utf-8")
