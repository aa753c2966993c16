"""merge-all: merge many adapters into one base, one output checkpoint for each.

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
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Lock

from lora_fx.checkpoint.merge import cores, plan_merge
from lora_fx.checkpoint.merge_settings import MergeOptions
from lora_fx.checkpoint.provenance import history
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files import isolated
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.files.entries import inode_of
from lora_fx.files.hub import known_as
from lora_fx.files.locks import BUSY
from lora_fx.files.run_files import run_of_files
from lora_fx.formats.io import without_ending
from lora_fx.text import Json

_WAITS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds between tries at an output that another merge is writing."""


_OTHER_ENDINGS = (".bin", ".onnx")
"""Suffixes removed from names besides those of formats; a version (llama-3.2) is no suffix."""


@dataclass(frozen=True)
class Job:
    """One adapter to merge: its path, its weight, and the path of its checkpoint."""

    adapter: str
    weight: float
    out: Path


def jobs_of(
    adapters: Sequence[tuple[str, float]],
    folder: Path,
    shard: tuple[int, int] = (1, 1),
    suffix: str = "",
) -> list[Job]:
    """The jobs of one shard; each output is named by the shortest unique end of its path.

    Args:
        adapters: (path, weight).
        folder: Where the outputs go.
        shard: (i, n), i from 1 to n.
        suffix: What the outputs' names end in, where they are files.

    Raises:
        LoraFxError: The same adapter twice, or no such shard.
    """
    number, count = shard
    if not 1 <= number <= count:
        raise LoraFxError(
            f"there is no shard {number}/{count}", "number the n shards from 1/n to n/n"
        )
    names = _output_names([path for path, _ in adapters])
    jobs = [Job(path, weight, folder / (names[path] + suffix)) for path, weight in adapters]
    jobs.sort(key=lambda job: job.out.name)
    return jobs[number - 1 :: count]


def _output_names(paths: Sequence[str]) -> dict[str, str]:
    """Path → its shortest end that no other path has, with `__` for separators.

    >>> _output_names(["a/x", "b/x", "y.safetensors"])
    {'a/x': 'a__x', 'b/x': 'b__x', 'y.safetensors': 'y'}
    """
    _refuse_repeated(paths, paths)
    parts = {path: Path(_without_ending(os.path.abspath(known_as(path)))).parts for path in paths}
    _refuse_repeated(paths, list(parts.values()))
    depths = dict.fromkeys(paths, 1)
    while True:
        names = {path: "__".join(parts[path][-depths[path] :]) for path in paths}
        counts = Counter(names.values())
        clashing = [path for path in paths if counts[names[path]] > 1]
        if not clashing:
            return names
        for path in clashing:
            depths[path] += 1


def _refuse_repeated(paths: Sequence[str], places: Sequence[Hashable]) -> None:
    """Raise if two paths lead to the same adapter."""
    counts = Counter(places)
    for path, place in zip(paths, places, strict=True):
        if counts[place] > 1:
            raise LoraFxError(f"{path} is given twice", "give every adapter once")


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
    run = run_of_files()
    if run is not None:
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
    """The command-line options of `lora-fx merge` for these options.

    >>> command_line(MergeOptions(dtype="fp16", untie=True))
    ['--dtype', 'float16', '--untie']
    """
    arguments: list[str] = []
    for field in fields(options):
        value = getattr(options, field.name)
        name = f"--{field.name.replace('_', '-')}"
        if value == field.default:
            continue
        arguments.append(name)
        if value is not True:
            arguments.append(str(value))
    return arguments


_PROGRAM = (*isolated.PYTHON, "-m", "lora_fx.cli")
"""The command that runs a merge in a separate process."""


def _unanswered(code: int, stderr: str) -> Json:
    """The failure of a merge that ended without its result: its error and hint."""
    *_, last_line = stderr.strip().split("\n")
    last_line = one_line(last_line, 200)
    reason = f": {last_line}" if last_line else ""
    if code >= 0:
        return {
            "ok": False,
            "error": f"the merge ended with code {code} and without a result{reason}",
            "hint": "run lora-fx merge BASE ADAPTER -o OUT to see its messages",
        }
    name = f"signal {-code}"
    if -code in set(signal.Signals):
        name = signal.Signals(-code).name
    hint = "try it again"
    if code == -signal.SIGKILL:
        hint = "if it ran out of memory, run fewer merges at a time (-j)"
    return {"ok": False, "error": f"the merge was ended by {name}{reason}", "hint": hint}


class _Running:
    """The processes of the merges that run now.

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
        self._lock = Lock()
        self._stopped = False
        self._processes: set[subprocess.Popen[str]] = set()

    def run(self, command: Sequence[str]) -> tuple[int, str, str]:
        """Run a command; returns its exit code, stdout and stderr."""
        with self._lock:
            if self._stopped:
                return -signal.SIGTERM, "", ""
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=isolated.environment(),
            )
            self._processes.add(process)
        stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr

    def stop(self) -> None:
        """Stop the running merges, which clean up after themselves, and start no new ones."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()

    def result(self, job: Job) -> Json:
        """Run one job and return its result; see merge_all."""
        row: Json = {"adapter": job.adapter, "out": str(job.out), "ok": True}
        try:
            return row | self._merged(job)
        except LoraFxError as error:
            return row | {"ok": False, "error": error.message, "hint": error.hint}

    def _merged(self, job: Job) -> Json:
        if self._is_kept(job):
            return {"kept": True}
        code, stdout, stderr = self._run_merge(job)
        try:
            result = json.loads(stdout)
        except ValueError:
            return _unanswered(code, stderr)
        if code == 2 and self._is_kept(job):
            return {"kept": True}

        row: Json = {"ok": bool(result["ok"]), "warnings": result["warnings"]}
        if not result["ok"]:
            return row | {"error": result["error"], "hint": result["hint"]}
        changed = result.get("tensors") or []
        ratios = [tensor["ratio"] for tensor in changed if tensor.get("ratio") is not None]
        gains = [tensor["gain"] for tensor in changed if tensor.get("gain") is not None]
        row["tensors"] = len(changed)
        row["ratio"] = max(ratios, default=None)
        row["gain"] = min(gains, default=None)
        return row

    def _run_merge(self, job: Job) -> tuple[int, str, str]:
        """Run a job's merge, again while another merge writes its output; returns what `run` does.

        A merge of a run that was killed lives on: it may be this very one.
        """
        adapter = job.adapter if job.weight == 1.0 else f"{job.adapter}:{job.weight!r}"
        command = [*_PROGRAM, "merge", self.base, adapter]
        command += ["-o", str(job.out), "--json", *self.arguments]
        for seconds in _WAITS:
            code, stdout, stderr = self.run(command)
            if code != 2 or BUSY not in stdout:
                return code, stdout, stderr
            time.sleep(seconds)
        return self.run(command)

    def _is_kept(self, job: Job) -> bool:
        """True if the output exists already and its metadata records this same merge."""
        if self.options is None or not job.out.exists():
            return False
        out = open_checkpoint(job.out)
        plan = plan_merge(self.base, [(job.adapter, job.weight)], self.options)
        names = {*plan.base.tensors, *plan.added}
        return out.tensors.keys() == names and history(out) == json.loads(plan.record())
