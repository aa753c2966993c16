"""export in mode merged: write the folded eval graph as an ONNX file that is proven first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.adapter.invocation import refuse_invocation
from lora_fx.compare import FOLD_TOL, Parity, Report, demand
from lora_fx.dtypes import Array
from lora_fx.fx.adapter_with_base import with_base
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.onnx_names import onnx_conditions
from lora_fx.fx.capture.unchanged import as_it_was
from lora_fx.fx.dotted_names import named_tensors, parameter_of
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.doubts import plain
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.module.module_base import said_of_other_bases
from lora_fx.fx.onnx_export.translation import OPSET
from lora_fx.fx.tensors import to_numpy
from lora_fx.inputs import SIZES, Named
from lora_fx.onnx.bfloat16 import unround
from lora_fx.onnx.names import mark_changed
from lora_fx.onnx.optimise import RewriteStage
from lora_fx.onnx.output_file import Output
from lora_fx.onnx.precision import GATES, narrow
from lora_fx.onnx.save import forget
from lora_fx.onnx.session import RuntimeSession, open_session
from lora_fx.onnx.tensor_copies import copies_of
from lora_fx.passes.fold import Folded, said_of_zeros
from lora_fx.passes.proofs.onnx_reference import FileRerun
from lora_fx.passes.proofs.parity import guards, prove, rows_of, torch_rerun, torch_run
from lora_fx.passes.proofs.probe_making import Subject
from lora_fx.passes.proofs.proof_inputs import arrays_of, feeds_of, is_real
from lora_fx.passes.proofs.reference import Run
from lora_fx.passes.proofs.torch_reference import TorchReference
from lora_fx.passes.verbs import export_files as files
from lora_fx.passes.verbs.adapt import find, fold, insert
from lora_fx.passes.verbs.export_optimised import optimised
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.export_probe import probe_file
from lora_fx.passes.verbs.export_torch import WIDENED, folded_already, level_gate, translated
from lora_fx.passes.verbs.open import captured_of, opened
from lora_fx.probe.probe import NONE
from lora_fx.text import Json


def export_merged(model: object, options: ExportOptions) -> Report:
    """Export in mode merged; see lora_fx.passes.verbs.export."""
    branched = _branched(model, options)
    with as_it_was(branched):
        return _write(branched, options)


def _branched(model: object, options: ExportOptions) -> CapturedModule:
    """Return the unfolded module that the file has to equal."""
    adapter = options.adapters
    assert adapter is None or isinstance(adapter, Adapter)  # see opened_adapters
    model = opened(model)
    if isinstance(model, AdaptedModule):
        if adapter is None:
            refuse_invocation(model.invocation, "the module's adapter", "mode merged")
            return model
        copied: AdaptedModule = copy.deepcopy(model)  # the caller's adapter stays
        copied.load_adapter(adapter)
        return copied
    if isinstance(model, CapturedModule):
        if adapter is not None:
            raise folded_already()
        return model

    captured = captured_of(model, options.capture_of_base())
    if adapter is None:
        return plain(captured)
    return insert(captured, adapter=adapter, dead="allow")


def _write(branched: CapturedModule, options: ExportOptions) -> Report:
    """Fold and prove the module, translate it, prove the file, and give the file its name."""
    captured = execution_of(branched).captured
    warnings: list[str] = [str(pinned) for pinned in captured.pinned]
    if isinstance(options.adapters, Adapter):
        metadata = {"the adapter": options.adapters.metadata}
        warnings += said_of_other_bases(metadata, captured.model)
    folded, parity = _folded(branched, options, warnings)
    changes = getattr(folded, "folded", ())
    translation = _translate(folded, options)
    del folded  # its weights are in memory only until the file holds them
    warnings += translation.warnings

    rewriting = _rewrite(branched, translation, options)
    if rewriting.warning:
        warnings.append(rewriting.warning)
    with options.output() as output:
        written = _write_proven(output, branched, translation.model, rewriting, options)
        demand(written.parity, "ONNX Runtime differs from torch")
        of_probe = _add_probe(output, branched, written.session, options, warnings)

    warnings += written.notes
    if written.session.note:
        warnings.append(written.session.note)
    warnings += _warnings_of_fold(changes, translation.unrounded)

    details: Json = {
        "opset": options.opset or OPSET,
        "mode": "merged",
        "nodes": written.nodes,
        "grown_bytes": sum(change.grew for change in changes),
        **files.on_device(output, written.session),
        **rows_of(execution_of(branched).captured),
        **of_probe,
    }
    if options.optimise:
        details["stages"] = [stage.to_json() for stage in written.stages]
    parity += written.parity
    return files.report_of(output.files, written.session.provider, parity, warnings, details)


def _folded(
    branched: CapturedModule, options: ExportOptions, warnings: list[str]
) -> tuple[CapturedModule, list[Parity]]:
    """Fold the branches and return the module with its parity; a plain module is returned as is."""
    if not isinstance(branched, AdaptedModule):
        return branched, []
    folded = fold(branched)
    if not insertion_of(branched).changes_anything():
        warnings.append("the adapter changes nothing: all of its updates are zero")
    parity = prove(
        torch_run(folded),
        branched,
        arrays=options.inputs,
        tol=FOLD_TOL,
        of="fold",
        rerun=torch_rerun(folded),
    )
    demand(parity, "the fold differs from the unfolded model")
    return folded, parity


@dataclass(frozen=True)
class _Translation:
    """A folded module, translated to ONNX.

    Attributes:
        model: The model.
        values: How its tensors are read, by name, if stages of optimise are to come.
        unrounded: Names of the tensors that are stored as they were before they were rounded to
            the module's bfloat16.
        warnings: What has to be said.
    """

    model: Any
    values: Mapping[str, Callable[[], Array]]
    unrounded: frozenset[str]
    warnings: Sequence[str]


def _translate(folded: CapturedModule, options: ExportOptions) -> _Translation:
    """Translate a folded module, and mark the tensors that differ from the model's."""
    model, notes = translated(folded, options, level=options.accuracy_level)
    warnings = [*notes]
    values: dict[str, Callable[[], Array]] = {
        name: partial(to_numpy, parameter_of(folded, name)) for name in named_tensors(folded)[0]
    }
    unrounded: frozenset[str] = frozenset()
    if WIDENED in notes:
        exact_values = _unrounded(folded, options)
        unrounded = unround(model, exact_values, copies_of(model))
        for name in unrounded:
            values[name] = exact_values[name]
        warnings += [
            f"{name}: rounded to bfloat16 during the export"
            for name in exact_values
            if name not in unrounded
        ]
    mark_changed(model, values)
    values_of_rewrites = values if options.optimise else {}
    return _Translation(model, values_of_rewrites, unrounded, warnings)


def _unrounded(folded: CapturedModule, options: ExportOptions) -> dict[str, Callable[[], Array]]:
    """Return each changed tensor's value before it was rounded to the model's dtype."""
    result: dict[str, Callable[[], Array]] = dict(getattr(folded, "unrounded", {}))
    if isinstance(options.adapters, Adapter):
        # the module holds whole tensors in its own dtype, and the adapter as they were trained
        captured = execution_of(folded).captured
        bound = bind(with_base(options.adapters, captured.model), find(captured))
        for name, full in bound.full.items():
            result[name] = partial(np.asarray, full.value)
    return result


@dataclass(frozen=True)
class _Rewriting:
    """An exported model after the stages of optimise and the change of precision.

    Attributes:
        model: The model; the exported one where neither was asked for.
        stages: The stages of optimise.
        tol: What its outputs are held to.
        warning: What the precision costs; empty without one.
    """

    model: Any
    stages: Sequence[RewriteStage]
    tol: float
    warning: str = ""


def _rewrite(
    branched: CapturedModule, translation: _Translation, options: ExportOptions
) -> _Rewriting:
    """Optimise the exported model and change its precision, if the options ask for this."""
    model = translation.model
    stages: list[RewriteStage] = []
    narrows = options.precision in GATES
    feeds: list[Named] = []
    if options.optimise or narrows:
        for _, arrays, is_extra in feeds_of(branched, options.inputs):
            if not is_extra:
                feeds.append(arrays)

    if options.optimise:
        model, stages = optimised(model, feeds, options.provider, options.made_for)
        mark_changed(model, translation.values)
    if options.precision is None or not narrows:
        return _Rewriting(model, stages, level_gate(options))
    drawn = 0 if options.inputs else len(feeds)
    execution = execution_of(branched)
    if drawn and is_real(execution.captured.named):
        feeds.append(arrays_of(execution.in_own_dtype()))  # the proof runs the example too
    narrowed = narrow(model, options.precision, feeds, options.provider, options.tol, drawn=drawn)
    tol = options.tol or GATES[options.precision]
    return _Rewriting(narrowed.model, stages, tol, narrowed.said(options.precision))


@dataclass(frozen=True)
class _Written:
    """The number of nodes of a file, its stages, the session that ran it, parity and notes."""

    nodes: int
    stages: Sequence[RewriteStage]
    session: RuntimeSession
    parity: list[Parity]
    notes: Sequence[str]


def _write_proven(
    output: Output,
    branched: CapturedModule,
    exported: Any,
    rewriting: _Rewriting,
    options: ExportOptions,
) -> _Written:
    """Write the rewritten model, or the exported one if all stages together are too far off.

    Each stage was near the exported graph, but together they may be too far from torch.
    """
    written = _write_and_compare(
        output, branched, rewriting.model, rewriting.stages, rewriting.tol, options
    )
    is_rewritten = any(stage.kept for stage in rewriting.stages)
    if not is_rewritten or options.precision in GATES or all(row.ok for row in written.parity):
        return written
    reason = "the result of all rewrites differs too much from torch"
    dropped = [replace(stage, kept=False, why=stage.why or reason) for stage in rewriting.stages]
    return _write_and_compare(output, branched, exported, dropped, rewriting.tol, options)


def _write_and_compare(
    output: Output,
    branched: CapturedModule,
    model: Any,
    stages: Sequence[RewriteStage],
    tol: float,
    options: ExportOptions,
) -> _Written:
    """Write one model, and compare the file with the unfolded module."""
    conditions = onnx_conditions(branched.conditions())
    notes = files.save_within(output, model, conditions, guards(branched), options)
    nodes = sum(1 for _ in model.graph.all_nodes())
    if output.external and not stages:  # else the exported one may be written after all
        forget(model)
    session = open_session(output.path, options.provider)
    parity = prove(
        session.run,
        branched,
        arrays=options.inputs,
        tol=tol,
        of="onnxruntime",
        rerun=FileRerun(output.path, options.provider),
    )
    return _Written(nodes, stages, session, parity, notes)


def _add_probe(
    output: Output,
    branched: CapturedModule,
    session: RuntimeSession,
    options: ExportOptions,
    warnings: list[str],
) -> Json:
    """Put a probe into the file; return the field of the report."""
    if options.probe == NONE:
        return {}
    captured = execution_of(branched).captured
    reference = TorchReference(captured, partial(_inserted, captured), options.inputs)
    runs = reference.varied()  # with branches of their own: a user's module may be in use
    adapters: dict[str, Adapter] = {}
    if isinstance(branched, AdaptedModule) and branched.active:
        adapters = {"adapter": branched.adapter()}

    def of_file(name: str) -> Run | None:
        return session.run if name in adapters or not adapters else None

    subject = Subject(
        mode="merged",
        run=of_file,
        reference=runs.run,
        vary=runs.run,
        is_slow=True,
        adapters=adapters,
        found=find(captured),
        feeds=reference.drawn,
        user_feeds=partial(reference.feeds, SIZES[0]),
        base=reference.base_facts(),
        precision=options.computes_in,
        narrow=runs.narrow,
    )
    return probe_file(output.path, subject, options.probe, session.provider, warnings)


def _inserted(captured: Captured, adapter: Adapter) -> CapturedModule:
    return insert(captured, adapter=adapter, dead="allow")


def _warnings_of_fold(changes: Sequence[Folded], unrounded: frozenset[str]) -> list[str]:
    """Return warnings about folded weights and about what their rounding lost."""
    warnings = [*said_of_zeros(changes)]
    warnings += [change.said for change in changes if change.said]
    for change in changes:
        if change.kept < 0.95 and change.stored_as not in unrounded:
            warnings.append(
                f"{change.parameter}: rounding kept only {change.kept:.1%} of the change"
            )
    return warnings
