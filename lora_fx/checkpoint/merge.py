"""merge: adapters folded into a checkpoint, streamed, proven, then named.

W_new = round(W + Σ wᵢ·sᵢ·BᵢAᵢ) for every touched tensor; everything else byte for byte.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.truncate import Approximated, as_lora
from lora_fx.checkpoint.fold import Space, Stats, prepared, read_block
from lora_fx.checkpoint.merge_plan import LENIENT, Given, MergeOptions, MergePlan, make_plan
from lora_fx.checkpoint.prove import prove
from lora_fx.checkpoint.provenance import adapter_hash, history
from lora_fx.checkpoint.requantise import HINT, in_all, refuse_loss
from lora_fx.checkpoint.write import REPORTS, Progress, report_name, write
from lora_fx.compare import Report
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, NoEffectError, explained, one_line
from lora_fx.files import isolated
from lora_fx.files.atomic import check_output, check_space, replacing
from lora_fx.files.checkpoint import PICKLES, Checkpoint, open_checkpoint
from lora_fx.files.entries import inode_of
from lora_fx.files.hub import known_as, local
from lora_fx.files.locks import BUSY
from lora_fx.files.read import trusting
from lora_fx.files.run_files import (
    check_unchanged,
    naming_changes,
    remember,
    remembering,
    run_of_files,
)
from lora_fx.formats.io import AdapterLike, load_adapter, without_ending
from lora_fx.formats.registry import FORMATS
from lora_fx.spellings import under_either_name
from lora_fx.text import Json, StrPath, counted, is_whole, some, table

OTHER_MODELS = (".onnx", ".pt2")
"""Endings of models that a merge of a checkpoint does not write."""
GAIN = 0.95
"""Below this share of Δ arriving in the stored dtype a merge warns."""
Adapters = AdapterLike | Sequence[AdapterLike | tuple[AdapterLike, float]]
_MISSED = ("error", "own")


@remembering()
def merge(
    base: StrPath,
    adapters: Adapters,
    out: StrPath,
    *,
    how: str = "sum",
    rank: int | None = None,
    dtype: str | None = None,
    allow_unused: bool = False,
    untie: bool = False,
    add: bool = False,
    again: bool = False,
    allow_missing: bool = False,
    any_base: bool = False,
    other_readers: bool = False,
    trust: bool = False,
    dequantise: bool = False,
    requantise: bool = False,
    lossy: bool = False,
    max_shard_size: int | str | None = None,
    link: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Report:
    """Fold adapters into a checkpoint and write a new one of the same kind.

    Args:
        base: A Hugging Face folder, its id on the Hub (hf:ORG/NAME[@REVISION]), or a `.safetensors`
            file; it is not changed.
        adapters: Paths or Adapters; a pair (adapter, weight) multiplies its updates by weight.
        out: The folder or file to write.
        how: Several adapters: sum (exact, one rounding), cat (the same sum), linear, svd.
        rank: The rank of an svd mix.
        dtype: What touched tensors are stored in: bfloat16, float16, float32, float64; as they
            were where None.
        allow_unused: Leave out entries whose tensor the base lacks, instead of refusing.
        untie: Write a tied head as a tensor of its own where an update means one use only.
        add: Add whole tensors that the base lacks, such as a new head.
        again: Fold an adapter that the base's metadata says is in it already.
        allow_missing: Leave layers as they are that the adapter's config adapts and its file lacks.
        any_base: Fold an adapter that says it was trained on other weights than these.
        other_readers: Fold an update of a weight that more than its products read (a norm, an
            index), which the update does not reach, and a merge does.
        trust: Read pickles, by torch's unpickler that runs no code; safetensors are written.
        dequantise: Write the weights of a quantised checkpoint as floats, in `dtype` or bfloat16;
            quantization_config goes, and the shards are new.
        requantise: Write W̃ + Δ back in the codes of a quantised checkpoint; what that keeps of
            the update is reported, and less than half of it in all is refused.
        lossy: Do not refuse that.
        max_shard_size: Bytes of the tensors of such a shard, or a text such as 2GB; 5 GB
            where None.
        link: Untouched shards share the base's inodes (hard links).
        force: Replace an output that exists.
        threads: How many work at a time; as many as there are cores where None.
        progress: Called with bytes done and bytes in all.
        workers: The old name of threads.

    Returns:
        A Report; `details["tensors"]` has, for every touched tensor, ‖Δ‖/‖W‖ (ratio), the share
        of elements that did not move (lost) and the share of Δ that arrived (gain). Of int8 ones
        also what quantising W + Δ missed, over ‖Δ‖ (error), and what quantising W is taken to
        have missed, over ‖W‖ (own).

    Raises:
        LoraFxError: Every reason not to merge; nothing is written.
        NoEffectError: Every element of the output would be what it was.
    """
    options = MergeOptions(
        how=how, rank=rank, dtype=dtype, allow_unused=allow_unused, untie=untie, add=add,
        again=again, allow_missing=allow_missing, any_base=any_base,
        other_readers=other_readers, trust=trust, dequantise=dequantise,
        requantise=requantise, lossy=lossy,
        max_shard_size=max_shard_size,
    )  # fmt: skip
    threads = under_either_name("workers", workers, "threads", threads)
    check_output(out, force=force)
    plan = plan_merge(base, adapters, options)
    return run(plan, out, link=link, force=force, threads=threads, progress=progress)


def plan_merge(base: StrPath, adapters: Adapters, options: MergeOptions | None = None) -> MergePlan:
    """What `merge` with these options would do; nothing is written."""
    options, base = options or MergeOptions(), local(base)
    with explained(base), trusting(options.trust):
        opened = open_checkpoint(Path(base))
        parts = given(adapters, 2 * opened.elements, Path(base))
        return make_plan(opened, parts, options)


@remembering()
def run(
    plan: MergePlan,
    out: StrPath,
    *,
    link: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Carry out a plan; see `merge`."""
    if threads is not None and (not is_whole(threads) or threads < 0):
        raise LoraFxError(f"threads is {threads!r}; expected a whole number", "leave it out")
    target = Path(out)
    remember(plan.base.path, *(t.file for t in plan.base.tensors.values()))
    for path in (g.path for g in plan.given if g.path):
        remember(path, *(path / name for name in FORMATS.names_of_input()))
    with explained(target):
        if target.suffix in PICKLES:
            raise LoraFxError(f"{target}: no pickle is written", "-o X.safetensors, or a folder")
        if target.suffix in OTHER_MODELS:
            raise LoraFxError(
                f"{target}: {plan.base.path} is a checkpoint, and what is written is one too",
                "-o X.safetensors, or a folder",
            )
        if link and not plan.base.path.is_dir():
            raise LoraFxError(
                f"link has no say for {plan.base.path}, one file, which is written anew",
                "leave --link out",
            )
        check_output(target, force=force, names=_names(plan, target))
        check_space(target.parent, plan.touched_bytes if link else plan.disk)
        with replacing(target, force=force) as stage:
            threads = threads or cores()
            with naming_changes():
                stats = write(plan, stage, threads=threads, link=link, progress=progress)
            moved = any(s.still < s.elements and s.delta for s in stats.values())
            whole = any(c.fold is None and not c.scales_of for c in plan.changes.values())
            anew = [s for n, s in stats.items() if plan.changes[n].requantised]
            if stats and not moved and not whole:
                wider = "--dequantise" if anew else "a wider --dtype"
                tensors = counted(len(stats), "tensor")
                raise NoEffectError(
                    f"{target}: not written: no element of {tensors} would change",
                    f"is the adapter untrained, or its weight 0? {wider} keeps small ones",
                )
            if not plan.options.lossy:
                refuse_loss(anew, target)
            wrong = list(prove(plan, open_checkpoint(stage), threads=threads))
            if wrong:
                check_unchanged()  # a base that is another one now has other numbers
                raise LoraFxError(
                    f"{target}: not written: {wrong[0].tensor!r} {wrong[0].what}",
                    "this is a mistake of lora-fx: please report it",
                )
            report = _report(plan, stats, target)
            name = report_name(plan)
            if stage.is_dir() and name:
                text = json.dumps(report_json(report), indent=1) + "\n"
                (stage / name).write_text(text, encoding="utf-8")
    return report


def _names(plan: MergePlan, target: Path) -> set[str]:
    """The files that the output can have; those of other sizes of shards are of the same kind."""
    names = {str(name) for name in plan.base.companions()[0]} | {*plan.base.shards, *REPORTS}
    kinds = (".safetensors", ".index.json")
    there = (p.name for p in target.iterdir()) if target.is_dir() else ()
    return names | {name for name in there if name.endswith(kinds)}


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def given(adapters: Adapters, most: int | None = None, base: Path | None = None) -> list[Given]:
    """Adapters as `merge` takes them, read; `most` and `base` as of load_adapter."""
    if isinstance(adapters, (str, os.PathLike, Adapter)):
        adapters = [adapters]
    result = []
    for item in adapters:
        pair = item if isinstance(item, tuple) and len(item) == 2 else (item, 1.0)
        (adapter, weight), where, path = pair, "the adapter", None
        known = isinstance(adapter, (str, os.PathLike, Adapter))
        if not known or not isinstance(weight, (int, float)):
            raise LoraFxError(
                f"{item!r} is no adapter to merge",
                "give paths and Adapters, or pairs of one and its weight, in a list",
            )
        if not isinstance(adapter, Adapter):
            where, path = str(adapter), Path(local(adapter, files=FORMATS.files_of_folders))
            adapter = load_adapter(path, most=most, base=base, resolve=False)
        digest = adapter_hash(adapter)
        result.append(Given(adapter, float(weight), where, digest, path, pair is item))
    return result


def plain_in(base: str | None, adapter: Adapter, **goal: Any) -> tuple[Adapter, list[Approximated]]:
    """An adapter as plain LoRA, see lora_fx.adapter.truncate; the base where a ΔW needs W."""
    delta_of = partial(delta_in, open_checkpoint(base)) if base else None
    return as_lora(adapter, **goal, delta_of=delta_of)


def delta_in(base: Checkpoint, adapter: Adapter) -> Array:
    """The ΔW [out, in] that a merge of an adapter of one update adds, whatever that reads of W.

    Raises:
        LoraFxError: The base lacks its tensor, or the update does not fit.
    """
    options = replace(LENIENT, allow_missing=True)
    plan = make_plan(base, [Given(adapter, 1.0, "the adapter", "")], options)
    change = next(iter(plan.changes.values()))
    if change.fold is None or len(change.fold.matrix.parts) != 1:
        raise LoraFxError(
            f"{change.name!r}: a stack of matrices, or groups of a convolution, is no one ΔW",
            "--exclude it, and merge it into its base",
        )
    fold = prepared(change.fold, change.weight)
    weight = read_block(change.weight, 0, fold.matrix.rows, fold.matrix.columns)
    delta = fold.sum(weight.astype(np.float32), 0, Space())[1]
    p = fold.matrix.parts[0]
    part = delta[p.top : p.bottom, p.left : p.right]
    return np.ascontiguousarray(part.T if p.transposed else part)


def _report(plan: MergePlan, stats: Mapping[str, Stats], target: Path) -> Report:
    rows = [c.to_json(stats.get(name)) for name, c in plan.changes.items()]
    warnings = list(plan.notes)
    codes = {n for n in stats if plan.changes[n].int8 is not None}
    anew = {n for n in stats if plan.changes[n].requantised}
    for names, how in (
        (stats.keys() - codes - anew, "rounded, {}: --dtype float16 or float32 keeps more"),
        (codes, "quantised to int8 anew, {}: " + HINT),
        (anew, "quantised anew, {}: --dequantise keeps all of it"),
    ):
        low = [(stats[n].gain, n) for n in names if stats[n].gain < GAIN]
        if low:
            worst = "{1} only {0:.1%}".format(*min(low))
            warnings.append(
                f"{len(low)} of {len(names)} tensors kept less than {GAIN:.0%} of their update "
                f"when {how.format(worst)}"
            )
    warnings += _said(plan)
    details = {**plan.to_json(), "tensors": rows, "base_verified": not plan.unverified}
    kept, noise = in_all(stats[n] for n in anew)
    details["requantised"] = {"kept": kept, "noise": noise} if anew else None
    return Report("merge", True, (), (str(target),), tuple(warnings), details)


def _said(plan: MergePlan) -> Iterator[str]:
    if any(name.endswith(PICKLES) for name in (plan.base.of or plan.base).shards):
        yield f"{plan.base.path}: its weights are pickles; the output's are safetensors"
    left = plan.base.companions()[1]
    if left:
        yield f"not copied, hidden or other copies of the weights: {some(left, 5)}"
    name = report_name(plan)
    if plan.base.path.is_dir() and name != REPORTS[0]:
        kept = f"{REPORTS[0]} is the base's own and is kept"
        yield f"{kept}: the report is {name}" if name else f"{kept}: no report is written"
    config = plan.base.config()
    said_dtype = config.get("dtype") or config.get("torch_dtype")
    if plan.options.dtype and said_dtype not in (None, plan.options.dtype):
        yield (
            f"config.json still says dtype {said_dtype}: transformers rounds to it when it loads, "
            "unless it is told another"
        )
    if plan.tie is not None:
        yield f"untied: {plan.tie.head} is a tensor of its own, as config.json now says"


def report_json(report: Report) -> Json:
    """What report.json holds; no paths, so that equal inputs give equal folders."""
    whole = report.to_json()
    return {k: v for k, v in whole.items() if k not in ("command", "outputs", "parity")}


def lines(report: Report) -> str:
    """The report as a table for people."""
    found = report.details["tensors"]
    found = [r for r in found if r["updates"] != ["dequantised"]]
    more = ("int8 error/‖Δ‖", "own/‖W‖") if any(r["int8"] for r in found) else ()
    more = (*more, "noise") if any(r["requantised"] for r in found) else more
    rows = [("tensor", "update", "‖Δ‖/‖W‖", "unmoved", "gain", *more)]
    for r in found:
        numbers = ["", "", "", *("" for _ in more)]
        if r["gain"] is not None:
            ratio = "∞" if r["ratio"] is None else f"{r['ratio']:.2e}"
            numbers[:3] = [ratio, f"{r['lost']:.1%}", f"{r['gain']:.3f}"]
        if r["int8"]:
            numbers[3:5] = ["" if r["int8"][n] is None else f"{r['int8'][n]:.2e}" for n in _MISSED]
        if r["requantised"] and r["requantised"]["noise"] is not None:
            numbers[-1] = f"{r['requantised']['noise']:.2f}"
        rows.append((r["key"], "; ".join(r["updates"]), *numbers))
    said = [*table([(*r,) for r in rows])]
    if left := len(report.details["tensors"]) - len(found):
        said.append(f"{left} more weights were dequantised")
    if anew := report.details.get("requantised"):
        said.append(f"in all: kept {anew['kept']:.1%} of the update, noise {anew['noise']:.2f}")
    return "\n".join([*said, f"wrote {report.outputs[0]}"])


# merge-all: one base, many adapters, one merged checkpoint each.
#
# Every merge is a process of its own, so that a damaged adapter, or one that needs more memory than
# there is, fails alone. What one machine of several does is decided by position only: adapter k of
# the sorted list belongs to shard k mod n, so a scheduler's array job needs no coordination.


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
