"""merge for .onnx files: add W + s·b·a to the initialisers in a new file, and prove the file.

The folded graph has the base's nodes, and views of constants that some uses have for their own.
Values are computed while they are written, so that memory holds one tensor at a time; afterwards
the file is opened again, what was not touched is compared byte for byte, and rows of what was are
computed again in fp64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.merge import Adapters
from lora_fx.checkpoint.merge_report import GAIN
from lora_fx.checkpoint.provenance import METADATA
from lora_fx.compare import Parity, Report, demand
from lora_fx.dtypes import Array
from lora_fx.errors import (
    LoraFxError,
    NoEffectError,
)
from lora_fx.files.atomic import check_output
from lora_fx.files.run_files import remember, remembering
from lora_fx.files.stored_tensors import same_bytes
from lora_fx.inputs import SIZES
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.match import Matched
from lora_fx.onnx.output_file import Output, output
from lora_fx.onnx.place import Place
from lora_fx.onnx.save import EXTERNAL_OVER, is_external, weight_bytes
from lora_fx.onnx.session import RuntimeSession, check_provider, open_session
from lora_fx.onnx.validity import blaming
from lora_fx.passes.fold import Fold, said_of_zeros
from lora_fx.passes.proofs.merged_tensors import prove_merge
from lora_fx.passes.proofs.onnx_reference import FileRerun, OnnxReference, reference_of
from lora_fx.passes.proofs.probe_making import Subject
from lora_fx.passes.proofs.reference import Run
from lora_fx.passes.verbs.export_probe import probe_file
from lora_fx.passes.verbs.merge_onnx_plan import OnnxMergeOptions, OnnxMergePlan, plan_onnx
from lora_fx.probe.probe import BASE, NONE
from lora_fx.progress import stage
from lora_fx.text import Json, StrPath, counted, table


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
    base: StrPath, adapters: Adapters, out: StrPath, options: OnnxMergeOptions
) -> Report:
    """Merge as `merge_onnx` does, with the options as one object."""
    source = Path(base)
    target = Path(out)
    remember(source)
    check_output(target, force=options.force)
    if options.run:
        check_provider(options.provider)
    plan = plan_onnx(source, adapters, options)
    has_data_file = is_external(source)  # once it is known to be a file that can be read
    if options.delta:
        _check_delta(source, target, has_data_file, options.places)

    graph = plan.graph
    before = {name: graph.reader(name) for name in graph.flow.stores}
    unfolded = graph.clone() if options.probe_kind != NONE or options.run else graph
    fold = _fold_into_graph(plan)
    with output(target, force=options.force, places=options.places) as file:
        external_over = 0 if has_data_file else options.external_over
        file.save(graph.model, external_over, delta=options.delta)
        changed = {*fold.applied.values(), *plan.matched.whole}
        with stage("checking the merged tensors"):
            written = prove_merge(
                file.loadable, target, before, changed, plan.targets, plan.matched, fold
            )
        _refuse_unchanged(target, written, before, changed)
        parity: list[Parity] = []
        notes = [*graph.notes]
        if options.run:
            parity = _run_beside_base(source, unfolded, file.loadable, plan.matched, options)
        else:
            notes += _load(source, file.loadable, weight_bytes(graph.model))
        of_probe: Json = {}
        if options.probe_kind != NONE:
            of_probe = _add_probe(source, unfolded, file, plan, options, notes)
    report = _report(file.files, fold, plan, notes, parity)
    return replace(report, details={**report.details, **of_probe})


def _fold_into_graph(plan: OnnxMergePlan) -> Fold:
    """Fold the updates, replace whole tensors, and note the merge in the metadata.

    The values of folded tensors are computed while they are written.
    """
    graph = plan.graph
    fold = Fold(plan.matched.updates, lazy=True)
    fold(graph)
    for name, value in plan.matched.whole.items():
        graph.store(name, value)
    this_merge = {"format": 1, "adapters": [adapter.record() for adapter in plan.adapters]}
    graph.model.metadata_props[METADATA] = json.dumps([*plan.merges, this_merge])
    return fold


def _refuse_unchanged(
    target: Path,
    written: OnnxGraph,
    before: Mapping[str, Callable[[], Array]],
    changed: Collection[str],
) -> None:
    """Raise if every tensor that should have changed still has its old bytes."""
    for name in changed:
        if name not in before or not same_bytes(written.reader(name)(), before[name]()):
            return
    tensors = counted(len(changed), "tensor")
    raise NoEffectError(
        f"{target}: not written: no element of {tensors} would change",
        "check that the adapter is trained and that its weight is not 0",
    )


def _check_delta(source: Path, target: Path, has_data_file: bool, places: Sequence[Place]) -> None:
    """Raise if the output cannot read its other tensors from the base's data file."""
    if not has_data_file:
        raise LoraFxError(
            f"{source} holds its weights inside the file, so there is no data file to share",
            "leave --delta out",
        )
    if source.resolve().parent != target.resolve().parent:
        raise LoraFxError(
            f"{target}: with --delta it uses the data file of {source}, and runtimes read no data "
            "file from another folder",
            f"write it with -o {source.with_name(target.name)}",
        )
    if places:
        raise LoraFxError("a copy for Triton has to hold all of its weights", "leave --delta out")


def _run_beside_base(
    source: Path, graph: OnnxGraph, written: Path, matched: Matched, options: OnnxMergeOptions
) -> list[Parity]:
    """Compare the merged file with the base and its branches, in ONNX Runtime."""
    if matched.whole:
        raise LoraFxError(
            f"--run compares low-rank updates, but {min(matched.whole)!r} is replaced whole",
            "leave --run out",
        )
    with reference_of(source, graph, options.provider, options.inputs) as reference:
        session = open_session(written, options.provider)
        adapter = Adapter(dict(matched.updates))
        rerun = FileRerun(written, options.provider)
        parity = reference.prove(session.run, adapter, "merged", rerun)
    demand(parity, "the merged file differs from the base with branches")
    return parity


def _add_probe(
    source: Path,
    graph: OnnxGraph,
    file: Output,
    plan: OnnxMergePlan,
    options: OnnxMergeOptions,
    notes: list[str],
) -> Json:
    """Put a probe into the merged file; return the field of the report.

    Where the merge runs nothing else, a large file or one that does not run gets none.
    """
    if not options.run and weight_bytes(graph.model) > EXTERNAL_OVER:
        notes.append("no probe: the file was not run; pass --run")
        return {}
    if plan.matched.whole:
        notes.append("no probe: the adapter replaces whole tensors, which nothing here runs")
        return {}
    try:
        with reference_of(source, graph, options.provider, options.inputs) as reference:
            session = open_session(file.loadable, options.provider)
            subject = _subject(session, reference, plan)
            return probe_file(file.path, subject, options.probe_kind, session.provider, notes)
    except LoraFxError as error:
        if options.run:
            raise
        notes.append(f"no probe: {error.message}")
        return {}


def _subject(session: RuntimeSession, reference: OnnxReference, plan: OnnxMergePlan) -> Subject:
    """Return the merged file as a probe is made of it."""

    def of_file(name: str) -> Run | None:
        return None if name == BASE else session.run

    adapter = Adapter(dict(plan.matched.updates))
    return Subject(
        mode="merged",
        run=of_file,
        reference=reference.run,
        vary=reference.run,
        adapters={"adapter": adapter},
        found=plan.targets,
        feeds=reference.drawn,
        user_feeds=partial(reference.feeds, SIZES[0]),
        base=reference.base_facts(),
    )


def _load(source: Path, written: Path, size: int) -> list[str]:
    """Load the written file in ONNX Runtime if that takes little memory; return notes."""
    if size > EXTERNAL_OVER:
        return [
            (
                "not loaded in ONNX Runtime, which would read the whole file: its tensors were "
                "compared"
            )
        ]
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
    rows: list[Json] = []
    for change in fold.report:
        tensor = fold.applied.get(f"{change.parameter}|{'|'.join(change.keys)}")
        rows.append({"key": ", ".join(change.keys), "tensor": tensor, "gain": change.kept})
    for name in plan.matched.whole:
        rows.append({"key": name, "tensor": name, "gain": None})
    warnings = [*notes, *_warnings(fold, plan)]
    outputs = tuple(map(str, files))
    return Report("merge", True, tuple(parity), outputs, tuple(warnings), {"tensors": rows})


def _warnings(fold: Fold, plan: OnnxMergePlan) -> list[str]:
    """Return warnings about the folded tensors."""
    warnings = [change.said for change in fold.report if change.said]
    rounded_away = [(change.kept, change.parameter) for change in fold.report if change.kept < GAIN]
    if rounded_away:
        least, parameter = min(rounded_away)
        warnings.append(
            f"{len(rounded_away)} of {len(fold.report)} tensors kept less than {GAIN:.0%} of "
            f"their update when rounded, {parameter} only {least:.1%}"
        )
    if plan.renamed:
        warnings.append(f"{plan.renamed} tensors were renamed as the exporter's metadata says")
    warnings += said_of_zeros(fold.report)

    names_of_base = set()
    for change in fold.report:
        names_of_base.add(change.parameter)
        if change.zeros:
            names_of_base.add(change.stored_as)
    added = sorted(set(fold.applied.values()) - names_of_base)
    if added:
        warnings.append(
            f"uses of one weight that differ now have separate constants: {', '.join(added)}"
        )
    return warnings


def lines(report: Report) -> str:
    """Return the report as a table of text."""
    rows: list[tuple[str, ...]] = [("tensor", "gain")]
    for row in report.details["tensors"]:
        gain = "replaced whole" if row["gain"] is None else f"{row['gain']:.3f}"
        rows.append((row["key"], gain))
    return "\n".join([*table(rows), f"wrote {' and '.join(report.outputs)}"])
