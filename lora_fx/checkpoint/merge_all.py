"""merge-all: one base, many adapters, one merged checkpoint each.

Every merge is a process of its own, so that a damaged adapter, or one that needs more memory than
there is, fails alone. What one machine of several does is decided by position only: adapter k of
the sorted list belongs to shard k mod n, so a scheduler's array job needs no coordination.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Lock

from lora_fx.checkpoint.merge import cores, plan_merge
from lora_fx.checkpoint.merge_options import MergeOptions
from lora_fx.checkpoint.provenance import history
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files import isolated
from lora_fx.files.atomic import BUSY
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.files.hub import known_as
from lora_fx.files.read import inode_of, run_of_files
from lora_fx.formats.io import without_ending
from lora_fx.text import Json

_WAITS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds between tries at an output that another merge is writing."""


_OTHER_ENDINGS = (".bin", ".onnx")
"""What a name loses beside the endings of formats; a version, as in llama-3.2, is no ending."""


@dataclass(frozen=True)
class Job:
    """One adapter of a fleet: its path, its weight, and where its checkpoint goes."""

    adapter: str
    weight: float
    out: Path


def jobs_of(
    adapters: Sequence[tuple[str, float]],
    folder: Path,
    shard: tuple[int, int] = (1, 1),
    suffix: str = "",
) -> list[Job]:
    """The jobs of one shard; outputs are named by the ends of the paths that tell them apart.

    Args:
        adapters: (path, weight).
        folder: Where the outputs go.
        shard: (i, n), i from 1 to n.
        suffix: What the outputs' names end in, where they are files.

    Raises:
        LoraFxError: The same adapter twice, or no such shard.
    """
    i, n = shard
    if not 1 <= i <= n:
        raise LoraFxError(f"no shard {i}/{n}", "shards are counted from 1/n to n/n")
    names = _output_names([path for path, _ in adapters])
    whole = sorted(
        (Job(path, weight, folder / (names[path] + suffix)) for path, weight in adapters),
        key=lambda job: job.out.name,
    )
    return whole[i - 1 :: n]


def _output_names(paths: Sequence[str]) -> dict[str, str]:
    """Path → the shortest end of it that no other path has, with `__` for separators.

    >>> _output_names(["a/x", "b/x", "y.safetensors"])
    {'a/x': 'a__x', 'b/x': 'b__x', 'y.safetensors': 'y'}
    """
    if twice := next((p for p, count in Counter(paths).items() if count > 1), None):
        raise LoraFxError(f"{twice} is there twice", "give every adapter once")
    parts = {p: Path(_without_ending(os.path.abspath(known_as(p)))).parts for p in paths}
    if len(set(parts.values())) < len(paths):
        twice = next(p for p in paths if [*parts.values()].count(parts[p]) > 1)
        raise LoraFxError(f"{twice} is there twice", "give every adapter once")
    depth = dict.fromkeys(paths, 1)
    while True:
        names = {p: "__".join(parts[p][-depth[p] :]) for p in paths}
        clash = [p for p in paths if [*names.values()].count(names[p]) > 1]
        if not clash:
            return names
        for p in clash:
            depth[p] += 1


def _without_ending(path: str) -> str:
    for ending in _OTHER_ENDINGS:
        if path.endswith(ending):
            return path.removesuffix(ending)
    return without_ending(path)


def merge_all(
    base: str,
    jobs: Sequence[Job],
    *,
    processes: int,
    force: bool,
    link: bool = False,
    options: MergeOptions | None = None,
) -> Iterator[Json]:
    """Merge every job; one result each, as they finish.

    Args:
        base: The checkpoint.
        jobs: See jobs_of.
        processes: How many merges run at a time.
        force: Replace outputs that exist; without it one that is this very merge is kept.
        link: Untouched shards share the base's inodes (hard links).
        options: Of every merge.

    Yields:
        {"adapter", "out", "ok"} and, where it failed, "error" and "hint"; "kept" is true for an
        output that was there already. Of others "tensors" is how many changed, "ratio" the
        largest ‖Δ‖/‖W‖ of one, and "gain" the least share of an update that rounding kept.
    """
    if (run := run_of_files()) is not None:
        run.outputs |= {job.out: inode_of(job.out) for job in jobs}
    options = options or MergeOptions()
    threads = max(1, cores() // max(1, processes))
    arguments = [*command_line(options), "--threads", str(threads)]
    if link:
        arguments.append("--link")
    if force:
        arguments.append("--force")
    running = _Running(base, arguments, None if force else options)
    with ThreadPoolExecutor(max(1, processes)) as pool:
        futures = [pool.submit(running.result, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if type(error) is not KeyboardInterrupt:  # Ctrl-C has reached the children as well
                running.stop()
            raise


def command_line(options: MergeOptions) -> list[str]:
    """The options of `lora-fx merge` that say the same.

    >>> command_line(MergeOptions(dtype="fp16", untie=True))
    ['--dtype', 'float16', '--untie']
    """
    arguments: list[str] = []
    for field in fields(options):
        value = getattr(options, field.name)
        name = f"--{field.name.replace('_', '-')}"
        if value == field.default:
            continue
        arguments += [name] if value is True else [name, str(value)]
    return arguments


_PROGRAM = (*isolated.PYTHON, "-m", "lora_fx.cli")
"""What a merge of its own process is."""


def _unanswered(code: int, err: str) -> tuple[str, str]:
    """The error and the hint of a merge that ended without its result."""
    last = one_line(err.strip().rpartition("\n")[2], 200)
    told = f": {last}" if last else ""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        killed = code == -signal.SIGKILL
        hint = "was it killed for its memory? fewer -j" if killed else "try it again"
        return f"the merge was ended by {name}{told}", hint
    why = f"the merge ended with code {code} and without a result{told}"
    return why, "lora-fx merge BASE ADAPTER -o OUT shows what it says"


class _Running:
    """The merges that run now.

    Args:
        base: The checkpoint.
        arguments: Those of every merge.
        options: The same, by which an output is known that is this very merge and stays; None
            where every output is replaced.
    """

    def __init__(self, base: str, arguments: Sequence[str], options: MergeOptions | None) -> None:
        self.base = base
        self.arguments = arguments
        self.options = options
        self._lock, self._stopped = Lock(), False
        self._processes: set[subprocess.Popen[str]] = set()

    def run(self, command: Sequence[str]) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        pipe = subprocess.PIPE
        with self._lock:
            if self._stopped:
                return -signal.SIGTERM, "", ""
            process = subprocess.Popen(
                command, stdout=pipe, stderr=pipe, text=True, env=isolated.environment()
            )
            self._processes.add(process)
        out, err = process.communicate()
        return process.returncode, out, err

    def stop(self) -> None:
        """End those that go on, each with its own clean-up, and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()

    def result(self, job: Job) -> Json:
        """Merge one, and say how it went; see merge_all."""
        row: Json = {"adapter": job.adapter, "out": str(job.out), "ok": True}
        try:
            return row | self._merged(job)
        except LoraFxError as error:
            return row | {"ok": False, "error": error.message, "hint": error.hint}

    def _merged(self, job: Job) -> Json:
        if self._is_kept(job):
            return {"kept": True}
        adapter = job.adapter if job.weight == 1.0 else f"{job.adapter}:{job.weight!r}"
        command = [*_PROGRAM, "merge", self.base, adapter]
        for wait in (*_WAITS, None):
            code, out, err = self.run([*command, "-o", str(job.out), "--json", *self.arguments])
            if wait is None or code != 2 or BUSY not in out:
                break
            time.sleep(wait)  # a merge of a run that was killed lives on: it may be this very one
        try:
            said = json.loads(out)
        except ValueError:
            why, hint = _unanswered(code, err)
            return {"ok": False, "error": why, "hint": hint}
        if code == 2 and self._is_kept(job):
            return {"kept": True}
        row: Json = {"ok": bool(said["ok"]), "warnings": said["warnings"]}
        if not said["ok"]:
            return row | {"error": said["error"], "hint": said["hint"]}
        changed = said.get("tensors") or []
        row["tensors"] = len(changed)
        for name, worst in (("ratio", max), ("gain", min)):
            row[name] = worst((t[name] for t in changed if t.get(name) is not None), default=None)
        return row

    def _is_kept(self, job: Job) -> bool:
        """True where an output is there that this very merge would write; by its own record."""
        if self.options is None or not job.out.exists():
            return False
        out = open_checkpoint(job.out)
        plan = plan_merge(self.base, [(job.adapter, job.weight)], self.options)
        names = {*plan.base.tensors, *plan.added}
        return set(out.tensors) == names and history(out) == json.loads(plan.record())
