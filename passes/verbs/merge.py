"""merge for .onnx files: W + s·b·a in the initialisers, streamed, proven, then named.

The folded graph has the base's nodes, and views of constants that some uses have for their own.
Values are computed while they are written, so that memory holds one tensor at a time; afterwards
the file is opened again, what was not touched is compared byte for byte, and rows of what was are
computed again in fp64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import fspath
from pathlib import Path

from lora_fx.adapter.adapter import HOWS, Adapter, mix
from lora_fx.checkpoint.merge import GAIN, Adapters, given, plan_merge
from lora_fx.checkpoint.merge import run as merge_checkpoint
from lora_fx.checkpoint.merge_plan import Given, MergeOptions, refuse_rank
from lora_fx.checkpoint.provenance import METADATA, merges_of, refuse_again
from lora_fx.checkpoint.write import Progress
from lora_fx.compare import Parity, Report, demand
from lora_fx.errors import (
    LoraFxError,
    NoEffectError,
    NoSay,
    expect_path,
    given_options,
    refuse_no_say,
)
from lora_fx.files.atomic import check_output
from lora_fx.files.read import remember, remembering, trusting
from lora_fx.files.safetensors import same_bytes
from lora_fx.inputs import Named
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.match import Matched, match
from lora_fx.onnx.names import named_graph
from lora_fx.onnx.save import EXTERNAL_OVER, Place, is_external, output, weight_bytes
from lora_fx.onnx.session import open_session
from lora_fx.onnx.validity import blaming
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold, said_of_zeros
from lora_fx.passes.proofs.merged_tensors import prove_merge
from lora_fx.passes.proofs.onnx_reference import FileRerun, reference_of
from lora_fx.spellings import under_either_name
from lora_fx.targets.target import Found
from lora_fx.text import Json, StrPath, counted, table


@dataclass(frozen=True, kw_only=True)
class OnnxMergeOptions:
    """What a merge into an .onnx file is asked for; an object that exists is in order.

    Attributes:
        names: Adapter key → tensor of the file, where the names do not tell.
        again: Fold an adapter that the file's metadata says is in it already.
        trust: Read pickles, by torch's unpickler that runs no code.
        force: Replace an output that exists.
        external_over: Bytes of weights above which they go to a file of their own.
        places: Where copies go.
        how: Several adapters: sum (cat is the same), or linear and svd, which mix factors first.
        rank: The rank of an svd mix.
        delta: Write only what changes: the output reads the rest from the base's data file, which
            has to lie in the same folder and to stay.
        run: Also run it against the base with branches, at three sizes; that takes memory.
        inputs: Arrays by input name for run, instead of sampled ones.
        provider: The provider of `run`: auto, cpu or cuda.
    """

    names: Mapping[str, str] | None = None
    again: bool = False
    trust: bool = False
    force: bool = False
    external_over: int = EXTERNAL_OVER
    places: Sequence[Place] = ()
    how: str = "sum"
    rank: int | None = None
    delta: bool = False
    run: bool = False
    inputs: Named | None = None
    provider: str = "cpu"

    def __post_init__(self) -> None:
        """Raise for a mix that is not known."""
        if self.how != "sum" and self.how not in HOWS:
            raise LoraFxError(f"no mix {self.how!r}", f"sum, {', '.join(HOWS)}")
        refuse_rank(self.how, self.rank)

    @classmethod
    def of(cls, options: Named) -> OnnxMergeOptions:
        """Those of `merge` that an .onnx file has; raises where another is given.

        Args:
            options: By name; None leaves one at its default.
        """
        cls.refuse_others(options)
        known = {f.name for f in fields(cls)}
        asked = cls(**{k: v for k, v in options.items() if k in known and v is not None})
        refuse_no_say([RUN], asked, given_options(options))
        return asked

    @classmethod
    def refuse_others(cls, options: Named) -> None:
        """Raise for an option that was given and is none of an .onnx file."""
        known = {f.name for f in fields(cls)}
        for name, value in options.items():
            if name not in known and value not in (None, False, "sum"):
                raise LoraFxError(
                    f"{name} is an option for checkpoints, not for .onnx files", "leave it out"
                )


RUN: NoSay[OnnxMergeOptions] = NoSay(
    ("inputs", "provider"), lambda o: not o.run, "without --run, which runs the file"
)
"""What only a run of the merged file has."""


def merge_onnx(base: StrPath, adapters: Adapters, out: StrPath, **options: object) -> Report:
    """Fold adapters into an .onnx file and write another.

    Args:
        base: The file; it and its data are not changed.
        adapters: Paths or Adapters, or pairs of one and its weight; their sum is rounded once.
        out: The file to write; large weights go to `OUT.data` beside it.
        options: Those of OnnxMergeOptions.

    Raises:
        LoraFxError: Every reason not to merge; nothing is written.
        NoEffectError: Every element of the output would be what it was.
    """
    return merge_into_file(base, adapters, out, OnnxMergeOptions.of(options))


@remembering()
@blaming
def merge_into_file(
    base: StrPath, adapters: Adapters, out: StrPath, asked: OnnxMergeOptions
) -> Report:
    """What `merge_onnx` does, with its options as an object."""
    source, target = Path(base), Path(out)
    remember(source)
    check_output(target, force=asked.force)
    plan = plan_onnx(source, adapters, asked)
    external = is_external(source)  # once it is known to be a file that can be read
    if asked.delta:
        _check_delta(source, target, external, asked.places)
    graph, matched, model = plan.graph, plan.matched, plan.graph.model
    before = {n: graph.reader(n) for n in graph.flow.stores}
    pristine = graph.clone() if asked.run else graph
    fold = Fold(matched.updates, lazy=True)
    fold(graph)
    for name, value in matched.whole.items():
        graph.store(name, value)
    now = {"format": 1, "adapters": [p.record() for p in plan.parts]}
    model.metadata_props[METADATA] = json.dumps([*plan.merges, now])
    with output(target, force=asked.force, places=asked.places) as made:
        made.save(model, 0 if external else asked.external_over, delta=asked.delta)
        changed = {*fold.applied.values(), *matched.whole}
        written = prove_merge(made.seen, target, before, changed, plan.found, plan.matched, fold)
        if all(n in before and same_bytes(written.reader(n)(), before[n]()) for n in changed):
            tensors = counted(len(changed), "tensor")
            raise NoEffectError(
                f"{target}: not written: no element of {tensors} would change",
                "is the adapter untrained, or its weight 0?",
            )
        parity = _ran(source, pristine, made.seen, matched, asked) if asked.run else []
        loads = [] if asked.run else _loads(source, made.seen, weight_bytes(model))
        notes = [*graph.notes, *loads]
    return _report(made.files, fold, plan, notes, parity)


def _check_delta(source: Path, target: Path, external: bool, places: Sequence[Place]) -> None:
    if not external:
        raise LoraFxError(
            f"{source} keeps its weights in itself, so there is no data file to share",
            "leave --delta out",
        )
    if source.resolve().parent != target.resolve().parent:
        raise LoraFxError(
            f"{target}: with --delta it reads the data of {source}, and runtimes read none from "
            "other folders",
            f"-o {source.with_name(target.name)}",
        )
    if places:
        raise LoraFxError("a copy for Triton has to hold all of its weights", "leave --delta out")


def _ran(
    source: Path, graph: OnnxGraph, written: Path, matched: Matched, options: OnnxMergeOptions
) -> list[Parity]:
    """The merged file against the base with branches, in ONNX Runtime."""
    if matched.whole:
        raise LoraFxError(
            f"--run compares updates, and {min(matched.whole)!r} is replaced whole",
            "leave --run out",
        )
    with reference_of(source, graph, options.provider, options.inputs) as reference:
        session = open_session(written, options.provider)
        adapter, rerun = Adapter(dict(matched.updates)), FileRerun(written, options.provider)
        parity = reference.prove(session.run, adapter, "merged", rerun)
    demand(parity, "the merged file differs from the base with branches")
    return parity


def _loads(source: Path, written: Path, size: int) -> list[str]:
    """Load what was written in ONNX Runtime, where that takes little memory; returns notes."""
    if size > EXTERNAL_OVER:
        return ["not loaded in ONNX Runtime, which would read all of it: tensors were compared"]
    try:
        open_session(written, "cpu")
    except LoraFxError:
        try:
            open_session(source, "cpu")
        except LoraFxError as error:  # bfloat16, say, of which the CPU has few ops
            return [f"ONNX Runtime here loads neither the base nor the output: {error.message}"]
        raise
    return []


def _report(
    files: Sequence[Path], fold: Fold, plan: OnnxMergePlan, notes: list[str], parity: list[Parity]
) -> Report:
    rows = [
        {"key": ", ".join(f.keys), "tensor": fold.applied.get(f"{f.parameter}|{'|'.join(f.keys)}"),
         "gain": f.kept}
        for f in fold.report
    ]  # fmt: skip
    rows += [{"key": n, "tensor": n, "gain": None} for n in plan.matched.whole]
    warnings = [*notes, *(f.said for f in fold.report if f.said)]
    low = [(f.kept, f.parameter) for f in fold.report if f.kept < GAIN]
    if low:
        warnings.append(
            f"{len(low)} of {len(fold.report)} tensors kept less than {GAIN:.0%} of their update "
            f"when rounded, {min(low)[1]} only {min(low)[0]:.1%}"
        )
    if plan.renamed:
        warnings.append(f"{plan.renamed} tensors got the names that the exporter's metadata tells")
    warnings += said_of_zeros(fold.report)
    known = {n for f in fold.report for n in (f.parameter, f.stored_as if f.zeros else f.parameter)}
    added = sorted(set(fold.applied.values()) - known)
    if added:
        warnings.append(f"uses that differ have constants of their own: {', '.join(added)}")
    outputs, details = tuple(map(str, files)), {"tensors": rows}
    return Report("merge", True, tuple(parity), outputs, tuple(warnings), details)


def lines(report: Report) -> str:
    """The report as a table for people."""
    rows: list[tuple[str, ...]] = [("tensor", "gain")]
    for r in report.details["tensors"]:
        rows.append((r["key"], "replaced whole" if r["gain"] is None else f"{r['gain']:.3f}"))
    return "\n".join([*table(rows), f"wrote {' and '.join(report.outputs)}"])


# The plan of a merge into an .onnx file: what goes where, read without its weights.


@dataclass(frozen=True)
class OnnxMergePlan:
    """A file and the adapters that go into it, in its keys.

    Attributes:
        graph: The file; nothing is folded yet.
        found: Its targets.
        parts: The adapters as given.
        matched: Their sum.
        renamed: Tensors that got the names that the exporter's metadata tells.
        merges: Those before, as the file's metadata tells of them.
    """

    graph: OnnxGraph
    found: Found
    parts: tuple[Given, ...]
    matched: Matched
    renamed: int
    merges: Sequence[Json]

    def rows(self) -> list[Json]:
        """One a key: the tensor, its shape, rank and scale, and the bytes that are written."""
        updates = ((k, self.found[k].parameter, u) for k, u in self.matched.updates.items())
        rows: list[Json] = [
            {"key": k, "tensor": p.name, "shape": list(p.shape), "rank": u.rank, "scale": u.scale}
            for k, p, u in updates
        ]
        rows += [
            {"key": n, "tensor": n, "shape": list(v.shape), "rank": None, "scale": None}
            for n, v in self.matched.whole.items()
        ]
        stored = self.graph.flow.tensor
        return [{**row, "bytes": stored(row["tensor"]).nbytes} for row in rows]

    def to_json(self) -> Json:
        """Fields of `merge --dry-run --json`."""
        size = weight_bytes(self.graph.model)
        return {"tensors": self.rows(), "bytes": size, "warnings": list(self.graph.notes)}

    def __str__(self) -> str:
        """A table, and what is written in all."""
        rows: list[tuple[str, ...]] = [("tensor", "shape", "rank", "scale", "bytes")]
        for r in self.rows():
            shape = "×".join(map(str, r["shape"]))
            scale = "whole" if r["scale"] is None else f"{r['scale']:g}"
            rows.append((r["key"], shape, str(r["rank"] or ""), scale, str(r["bytes"])))
        touched = sum(r["bytes"] for r in self.rows())
        total = weight_bytes(self.graph.model)
        return "\n".join([*table(rows), f"{total} bytes of weights, {touched} of them change"])


@blaming
def plan_onnx(base: StrPath, adapters: Adapters, options: OnnxMergeOptions) -> OnnxMergePlan:
    """See lora_fx.passes.verbs.merge.

    Raises:
        LoraFxError: Every reason not to merge that the files give.
    """
    source = Path(base)
    with trusting(options.trust):
        parts = given(adapters)
    graph, renamed = named_graph(source)
    merges = merges_of(graph.model.metadata_props.get(METADATA), str(source))
    refuse_again(source, merges, [(p.where, p.hash) for p in parts], again=options.again)
    found = find(graph)
    matched = _sum(parts, graph, found, options)
    return OnnxMergePlan(graph, found, tuple(parts), matched, renamed, merges)


def _sum(
    parts: Sequence[Given], graph: OnnxGraph, found: Found, options: OnnxMergeOptions
) -> Matched:
    """All adapters as one, in the graph's keys."""
    each = [match(p.adapter, graph, found, options.names) for p in parts]
    how = "cat" if options.how == "sum" else options.how
    if len(parts) == 1 and how == "cat":
        (one,) = each
        as_one = replace(parts[0].adapter, entries=dict(one.updates)).weighted(parts[0].weight)
        if one.whole and parts[0].weight != 1.0:
            raise LoraFxError(
                f"{parts[0].where}: weight {parts[0].weight:g}, and it holds whole tensors",
                "only updates in proportion to their scale can be weighted",
            )
        return Matched(as_one.lowrank, one.whole)
    if any(m.whole for m in each):
        raise LoraFxError("several adapters, and one holds whole tensors", "merge that one alone")
    bound = [
        (replace(p.adapter, entries=dict(m.updates)), p.weight)
        for p, m in zip(parts, each, strict=True)
    ]
    return Matched(dict(mix(bound, how, options.rank).lowrank), {})


# merge: adapters folded into a file of weights, or into an ONNX graph; neither needs torch.


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
    names: Mapping[str, str] | None = None,
    external_over: int | None = None,
    places: Sequence[Place] = (),
    delta: bool = False,
    run: bool = False,
    inputs: Named | None = None,
    provider: str | None = None,
    workers: int | None = None,
) -> Report:
    """Fold adapters into `base` and write `out`: the same kind of file.

    Args:
        base: A Hugging Face folder, a `.safetensors` or an `.onnx` file; it is not changed.
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
        other_readers: Fold an update of a weight that more than its products read.
        trust: Read pickles, by torch's unpickler that runs no code.
        dequantise: Write the weights of a quantised checkpoint as floats.
        requantise: Write them back in its codes.
        lossy: Do not refuse what codes lose of the update.
        max_shard_size: Bytes of a shard of what was dequantised, or a text such as 2GB.
        link: Untouched shards share the base's inodes (hard links).
        force: Replace an output that exists.
        threads: How many work at a time; as many as there are cores where None.
        progress: Called with bytes done and bytes in all.
        names: Of `.onnx`: adapter key → tensor of the file, where the names do not tell.
        external_over: Of `.onnx`: bytes of weights above which they go to a file of their own.
        places: Of `.onnx`: where copies go.
        delta: Of `.onnx`: write what changes, and share the rest with the base's data file.
        run: Of `.onnx`: run it too, beside the base with branches, at three sizes.
        inputs: Of `run`: arrays by input name, instead of sampled ones.
        provider: Of `run`: auto, cpu or cuda; cpu where None.
        workers: The old name of threads.

    `lora_fx.checkpoint.merge.merge` and `OnnxMergeOptions` say more about each.

    Raises:
        LoraFxError: Every reason not to merge; nothing is written.
        NoEffectError: Every element of the output would be what it was.
    """
    for name, path in (("base", base), ("out", out)):
        expect_path(path, name, "merge(base, adapters, out)")
    threads = under_either_name("workers", workers, "threads", threads)
    of_onnx_files = {
        "names": names, "external_over": external_over, "places": places, "delta": delta,
        "run": run, "inputs": inputs, "provider": provider,
    }  # fmt: skip
    if is_onnx(base):
        refuse_other_kind(base, out)
        of_checkpoints = {
            "dtype": dtype, "allow_unused": allow_unused, "untie": untie, "add": add,
            "allow_missing": allow_missing, "any_base": any_base, "other_readers": other_readers,
            "dequantise": dequantise, "requantise": requantise, "lossy": lossy,
            "max_shard_size": max_shard_size, "link": link, "threads": threads,
            "progress": progress,
        }  # fmt: skip
        of_both = {"how": how, "rank": rank, "again": again, "trust": trust, "force": force}
        return merge_onnx(base, adapters, out, **of_both, **of_checkpoints, **of_onnx_files)

    if wrong := [name for name in given_options(of_onnx_files) if name != "places" or places]:
        raise LoraFxError(
            f"{wrong[0]} is an option for .onnx files, not for checkpoints", "leave it out"
        )
    options = MergeOptions(
        how=how, rank=rank, dtype=dtype, allow_unused=allow_unused, untie=untie, add=add,
        again=again, allow_missing=allow_missing, any_base=any_base,
        other_readers=other_readers, trust=trust, dequantise=dequantise,
        requantise=requantise, lossy=lossy, max_shard_size=max_shard_size,
    )  # fmt: skip
    check_output(out, force=force)
    plan = plan_merge(base, adapters, options)
    return merge_checkpoint(plan, out, link=link, force=force, threads=threads, progress=progress)


def refuse_other_kind(base: StrPath, out: StrPath) -> None:
    """Raise for an output of an .onnx file that is called as something else."""
    if not is_onnx(out):
        raise LoraFxError(
            f"{fspath(out)} does not end in .onnx, and {fspath(base)} does", "-o OUT.onnx"
        )


def is_onnx(path: StrPath) -> bool:
    """True for a path whose name is an ONNX file's."""
    return fspath(path).endswith(".onnx")
