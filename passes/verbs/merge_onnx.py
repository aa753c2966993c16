"""merge for .onnx files: W + s·b·a in the initialisers, streamed, proven, then named.

The folded graph has the base's nodes, and views of constants that some uses have for their own.
Values are computed while they are written, so that memory holds one tensor at a time; afterwards
the file is opened again, what was not touched is compared byte for byte, and rows of what was are
computed again in fp64.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.merge import GAIN, Adapters
from lora_fx.checkpoint.provenance import METADATA
from lora_fx.compare import Parity, Report, demand
from lora_fx.errors import (
    LoraFxError,
    NoEffectError,
)
from lora_fx.files.atomic import check_output
from lora_fx.files.read import remember, remembering
from lora_fx.files.safetensors import same_bytes
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.match import Matched
from lora_fx.onnx.save import EXTERNAL_OVER, Place, is_external, output, weight_bytes
from lora_fx.onnx.session import open_session
from lora_fx.onnx.validity import blaming
from lora_fx.passes.fold import Fold, said_of_zeros
from lora_fx.passes.proofs.reference import FileRerun, prove_merge, reference_of
from lora_fx.passes.verbs.merge_onnx_plan import OnnxMergeOptions, OnnxMergePlan, plan_onnx
from lora_fx.text import StrPath, counted, table


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
