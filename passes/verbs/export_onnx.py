"""export of an .onnx file, from any framework; this needs no torch.

Mode merged is merge, then the stages of optimise where those are asked for. The other modes are
the same passes as after a torch export; what they have to equal is the file itself in ONNX
Runtime, with the branches that insert adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.files.run_files import scratch_folder
from lora_fx.onnx.batch_inputs import batch_symbol
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.manifest import check_no_slots
from lora_fx.onnx.match import Matched, match
from lora_fx.onnx.names import named_graph
from lora_fx.onnx.save import is_external
from lora_fx.onnx.validity import blaming
from lora_fx.passes.batch import StoredWeight
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.proofs.merged_tensors import prove_merge
from lora_fx.passes.proofs.onnx_reference import reference_of
from lora_fx.passes.verbs.export_batch import write_batch
from lora_fx.passes.verbs.export_files import adapters_of
from lora_fx.passes.verbs.export_optimised import optimise_file
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.export_switch import SwitchTargets, write_switch
from lora_fx.passes.verbs.merge_onnx import merge_onnx
from lora_fx.passes.verbs.refused_updates import exclude_hint
from lora_fx.targets.found import Found

UNNAMED = (
    "use mode merged or switch, or give dimension 0 of all inputs and outputs the same name: "
    "onnx.tools.update_model_dims.update_inputs_outputs_dims"
)
"""The hint for a file whose inputs share no dynamic dimension 0."""


@blaming
def export_onnx(source: str | PathLike[str], options: ExportOptions) -> Report:
    """Write another .onnx file from a file, which is not changed; see lora_fx.passes.verbs.export.

    Raises:
        LoraFxError: An adapter that does not fit, an option that the mode would ignore.
        NoEffectError: The outputs differ; nothing is written.
    """
    source = Path(source)
    if options.mode == "merged":
        return _merged_file(source, options)

    adapters = adapters_of(options)
    graph, renamed = named_graph(source)
    check_no_slots(graph.model, source)
    targets = find(graph)
    bound = {
        name: _bound(name, adapter, graph, targets, options.names)
        for name, adapter in adapters.items()
    }
    for name, adapter in adapters.items():
        if adapter.invocation:
            raise LoraFxError(
                f"{name} is an aLoRA, and the file that it is exported from is an .onnx graph, "
                "with which its mask of tokens cannot be compared",
                "export the model that the file was made from",
            )
    notes = [*graph.notes]
    if renamed:
        notes.append(f"{renamed} tensors were renamed as the exporter's metadata says")

    with reference_of(source, graph, options.provider, options.inputs) as reference:
        rewritten = graph.clone()
        if options.mode == "batch":
            batch_symbol(rewritten.model, "", UNNAMED)
            sources = _stored_weights(graph, targets)
            return write_batch(rewritten, reference, sources, bound, options, notes)
        keys, _ = options.chosen(targets, bound)
        return write_switch(rewritten, reference, SwitchTargets(keys), bound, options, notes)


def _bound(
    name: str, adapter: Adapter, graph: OnnxGraph, targets: Found, names: Mapping[str, str] | None
) -> Adapter:
    """Return an adapter with the keys and layouts of the graph."""
    matched = match(adapter, graph, targets, names)
    if matched.whole:
        without = exclude_hint(name, sorted(matched.whole))
        raise LoraFxError(
            f"{name}: it holds the whole tensor {min(matched.whole)!r}, which an .onnx file has no "
            "slot for: its exporter may have computed other constants of that tensor",
            f"export the model itself, whose file gets a slot; or {without}",
        )
    return replace(adapter, entries=dict(matched.updates), names=None)


def _stored_weights(graph: OnnxGraph, targets: Found) -> dict[str, tuple[str, StoredWeight]]:
    """Return the StoredWeight of every stored tensor by name, for mode batch."""
    calls = {}
    for target in (*targets.targets, *targets.optional):
        for number, site in enumerate(target.sites):
            calls[site.id] = f"call:{number}"
    return {
        parameter.name: (parameter.name, StoredWeight(parameter.shape, calls=calls))
        for parameter in graph.parameters()
    }


def _merged_file(source: Path, options: ExportOptions) -> Report:
    """Merge, then optimise; one of these two steps may be left out."""
    adapter = options.adapters
    assert adapter is None or isinstance(adapter, Adapter)  # see opened_adapters
    if adapter is None:
        if options.rewrites:
            return optimise_file(source, options)
        return _copied_file(source, options)
    if options.rewrites:
        return _merged_and_optimised(source, adapter, options)

    report = merge_onnx(
        source,
        [adapter],
        options.target,
        names=options.names,
        external_over=options.external_over,
        force=options.force,
        places=options.places,
        probe=options.probe,
    )
    return replace(report, command="export")


def _merged_and_optimised(source: Path, adapter: Adapter, options: ExportOptions) -> Report:
    """Merge into a temporary file, and optimise that file."""
    with scratch_folder() as folder:
        merged = Path(folder) / "merged.onnx"
        try:
            merge_report = merge_onnx(
                source,
                [adapter],
                merged,
                names=options.names,
                external_over=options.external_over,
                probe=options.probe,
            )
        except LoraFxError as e:
            message = e.message.replace(str(merged), str(options.target))
            raise LoraFxError(message, e.hint, exit_code=e.exit_code) from e
        report = optimise_file(merged, options)

    warnings = (*merge_report.warnings, *report.warnings)
    return replace(report, warnings=warnings, details={**merge_report.details, **report.details})


def _copied_file(source: Path, options: ExportOptions) -> Report:
    """Write a quantised file again, with the same bytes of its tensors.

    Raises:
        LoraFxError: A file that an adapter could be merged into: there is nothing to do.
    """
    graph = OnnxGraph(load(source))
    if not any(target.no_fold for target in find(graph).targets):
        raise LoraFxError(
            f"{source} is an .onnx file already, and there is nothing to do",
            "pass an adapter, --optimise, --precision, --target of a device, or another --mode",
        )

    before = {name: graph.reader(name) for name in graph.flow.stores}
    with options.output() as output:
        output.save(graph.model, 0 if is_external(source) else options.external_over)
        no_updates = Matched({}, {})
        prove_merge(
            output.loadable, options.target, before, set(), find(graph), no_updates, Fold({})
        )
    note = (
        "the output is a copy of the input: no adapter was given, and quantised weights cannot "
        "take one"
    )
    outputs = tuple(map(str, output.files))
    return Report("export", True, (), outputs, (note, *graph.notes), {"mode": "merged"})
