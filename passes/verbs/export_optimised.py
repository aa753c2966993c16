"""optimise: rewrite an exported graph in stages; each stage is kept only if proven equal.

The stages are those of lora_fx.onnx.optimise for the target of the file; a file's inputs come from
its signature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Report
from lora_fx.files.run_files import remember
from lora_fx.inputs import SIZES, Named
from lora_fx.onnx.load import load
from lora_fx.onnx.made_for import forms_for
from lora_fx.onnx.manifest import PROPERTY as MANIFEST
from lora_fx.onnx.names import give_own_names, mark_changed, restore_weight_names
from lora_fx.onnx.on_device import of_obstacles
from lora_fx.onnx.optimise import Rewrite, RewriteStage, apply_stages
from lora_fx.onnx.output_file import Output
from lora_fx.onnx.precision import GATES, narrow
from lora_fx.onnx.probe_runs import add_probe, probe_of, run_probe
from lora_fx.onnx.session import RuntimeSession, open_session
from lora_fx.onnx.signature import feeds_of_sizes, signature
from lora_fx.onnx.validity import blaming
from lora_fx.passes.proofs.probe_making import Subject
from lora_fx.passes.proofs.reference import Run
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.export_probe import probe_file, summary
from lora_fx.passes.verbs.verify_probe import report_on
from lora_fx.probe.probe import NONE, PROPERTY, SHORT
from lora_fx.probe.sentences import tolerant
from lora_fx.probe.verdict import RIGHT
from lora_fx.targets.found import Found
from lora_fx.text import Json

if TYPE_CHECKING:
    import onnx_ir as ir


def optimised(
    model: ir.Model,
    feeds: Sequence[Named],
    provider: str,
    target: str,
    stages: Mapping[str, Rewrite] | None = None,
) -> tuple[ir.Model, list[RewriteStage]]:
    """Optimise a model; return the new model with the weights' own names, and a row per stage.

    Args:
        model: The model.
        feeds: The inputs that each stage is proven on.
        provider: What runs it.
        target: What the file is made for.
        stages: The stages by name; all of that target where None.
    """
    rewritten, rows = apply_stages(model, feeds, stages, provider, target)
    give_own_names(rewritten, None, {})
    return rewritten, rows


@blaming
def optimise_file(source: str | PathLike[str], options: ExportOptions) -> Report:
    """Optimise an .onnx file and write the result; see docs/export.md.

    Args:
        source: The file; it is not changed.
        options: What export is asked for: the stages, a precision after them, or both.

    Raises:
        LoraFxError: The file does not load or run; nothing is written.
    """
    remember(source)
    provider = options.provider
    original = load(source)
    restore_weight_names(original)
    values = {}
    for name, value in original.graph.initializers.items():
        if value.const_value is not None:
            values[str(name)] = value.const_value.numpy
    session = open_session(source, provider)
    feeds = list(feeds_of_sizes(signature(session), options.inputs or {}))

    chosen_stages: Mapping[str, Rewrite] | None = None
    if not options.optimise:
        chosen_stages = forms_for(options.made_for)
    model, stages = optimised(original, feeds, provider, options.made_for, chosen_stages)
    mark_changed(model, values)
    notes = [session.note] if session.note else []
    notes += _said_of_forms(stages, options.made_for)
    if options.precision:
        narrowed = narrow(
            model,
            options.precision,
            feeds,
            provider,
            options.tol,
            drawn=0 if options.inputs else len(feeds),
        )
        model = narrowed.model
        notes.append(narrowed.said(options.precision))

    with options.output() as output:
        output.save(model, has_forms=True)
        of_probe = _add_probe(source, output, session, options, notes)
    details = {
        "provider": session.provider,
        "mode": "optimised",
        "nodes": sum(1 for _ in model.graph.all_nodes()),
        "stages": [stage.to_json() for stage in stages],
        **of_obstacles(options.target, output.obstacles, session.provider, options.made_for),
        **of_probe,
    }
    outputs = tuple(map(str, output.files))
    return Report("export", True, (), outputs, tuple(notes), details)


def _add_probe(
    source: str | PathLike[str],
    output: Output,
    of_source: RuntimeSession,
    options: ExportOptions,
    notes: list[str],
) -> Json:
    """Give the rewritten file a probe; return the field of the report.

    It is the source's own, where it has one and the rewritten file passes it within the gate of its
    precision, with every adapter. Else it knows the source's outputs alone.

    Raises:
        LoraFxError: The source's probe is damaged.
    """
    if options.probe == NONE:
        return {}
    if PROPERTY not in of_source.metadata:
        if MANIFEST in of_source.metadata:
            notes.append(f"no probe: {source} takes adapters, and has none that would know them")
            return {}
        subject = _subject(output, of_source, options)
        return probe_file(output.path, subject, options.probe, of_source.provider, notes)
    probe = tolerant(probe_of(source), GATES.get(options.precision or "", 0.0))
    runs = run_probe(output.path, probe, options.provider, beside=Path(source))
    report = report_on(output.target, probe, runs)
    if not report:
        failed = [row["sentence"] for row in report.details["verdicts"] if row["verdict"] != RIGHT]
        reason = [*failed, *report.warnings][0]
        notes.append(f"no probe: that of {source} does not fit the rewritten file: {reason}")
        return {}
    if options.probe == SHORT:
        probe = probe.without_groups()
    add_probe(output.path, probe)
    return {"probe": summary(probe)}


def _subject(output: Output, of_source: RuntimeSession, options: ExportOptions) -> Subject:
    """Return the rewritten file as a probe is made of it: a base without adapters."""
    rewritten = open_session(output.path, options.provider)
    inputs = signature(of_source)

    def of_file(_: str) -> Run:
        return rewritten.run

    def of_model(_: Adapter | None) -> Run:
        return of_source.run

    return Subject(
        mode="merged",
        run=of_file,
        reference=of_model,
        vary=of_model,
        adapters={},
        found=Found(()),
        feeds=partial(inputs.sample, SIZES[0]),
        precision=options.computes_in,
    )


def _said_of_forms(stages: Sequence[RewriteStage], target: str) -> list[str]:
    """Return a line for each form of the target that the file does not have."""
    return [
        f"the form {stage.name!r} for {target} was rolled back, and its nodes are as they were: "
        f"{stage.why}"
        for stage in stages
        if stage.name in forms_for(target) and not stage.kept
    ]
