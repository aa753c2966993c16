"""export of an .onnx file, from whatever framework, without torch.

Mode merged is merge, then the stages of optimise where those are asked for. The other modes are
the same passes as after a torch export; what they have to equal is the file itself in ONNX
Runtime, with the branches that insert adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.files.read import scratch_folder
from lora_fx.onnx.batch import batch_symbol
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
from lora_fx.passes.proofs.reference import prove_merge, reference_of
from lora_fx.passes.verbs.export_batch import write_batch
from lora_fx.passes.verbs.export_files import by_name
from lora_fx.passes.verbs.export_optimised import optimise_file
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.export_switch import write_switch
from lora_fx.passes.verbs.merge_onnx import merge_onnx
from lora_fx.passes.verbs.refused_updates import exclude_hint
from lora_fx.targets.target import Found
from lora_fx.text import Json

if TYPE_CHECKING:
    pass


UNNAMED = (
    "use mode merged or switch, or name dimension 0 of the inputs and outputs alike: "
    "onnx.tools.update_model_dims.update_inputs_outputs_dims"
)
"""What to do with a file whose inputs share no dynamic dimension 0."""


@blaming
def export_onnx(source: str | PathLike[str], options: ExportOptions) -> Report:
    """Write another .onnx file of a file, which is not changed; see lora_fx.passes.verbs.export.

    Raises:
        LoraFxError: An adapter that does not fit, an option that the mode would ignore.
        NoEffectError: The outputs differ; nothing is written.
    """
    source = Path(source)
    if options.mode == "merged":
        return _merged_file(source, options)
    adapters = by_name(options)
    graph, renamed = named_graph(source)
    check_no_slots(graph.model, source)
    found = find(graph)
    bound = {n: _bound(n, a, graph, found, options.names) for n, a in adapters.items()}
    said = [*graph.notes]
    if renamed:
        said.append(f"{renamed} tensors got the names that the exporter's metadata tells")
    with reference_of(source, graph, options.provider, options.inputs) as reference:
        rewritten = graph.clone()
        if options.mode == "batch":
            batch_symbol(rewritten.model, "", UNNAMED)
            every = (*found.targets, *found.optional)
            calls = {s.id: f"call:{n}" for t in every for n, s in enumerate(t.sites)}
            stored = {p.name: StoredWeight(p.shape, calls=calls) for p in graph.parameters()}
            sources = {name: (name, weight) for name, weight in stored.items()}
            return write_batch(rewritten, reference, sources, bound, options, said)
        keys, _ = options.chosen(found, bound)
        return write_switch(rewritten, reference, keys, bound, options, said)


def _bound(
    name: str, adapter: Adapter, graph: OnnxGraph, found: Found, names: Mapping[str, str] | None
) -> Adapter:
    """An adapter in the keys and layouts of the graph."""
    matched = match(adapter, graph, found, names)
    if matched.whole:
        raise LoraFxError(
            f"{name}: it holds the whole tensor {min(matched.whole)!r}; expected s·b·a",
            exclude_hint(name, sorted(matched.whole)),
        )
    return replace(adapter, entries=dict(matched.updates), names=None)


def _merged_file(source: Path, options: ExportOptions) -> Report:
    """Merge, then optimise; one of the two may be left out."""
    adapter: Any = options.adapters  # the path of one too
    target = options.target
    if isinstance(adapter, Mapping) and not isinstance(adapter, Adapter):
        raise LoraFxError("merged takes one adapter", "lora-fx merge takes several")
    rewritten = options.rewrites
    if adapter is None and not rewritten:
        graph = OnnxGraph(load(source))
        if any(t.no_fold for t in find(graph).targets):  # where nothing could be merged
            return _copied(source, graph, options)
        raise LoraFxError(
            f"{source} is an .onnx file already, and there is nothing to do",
            "give an adapter, --optimise, --precision or a --mode",
        )
    last: Json = {"force": options.force, "places": options.places}
    given: Json = {"names": options.names, "external_over": options.external_over}
    if not rewritten:
        return replace(merge_onnx(source, [adapter], target, **given, **last), command="export")
    if adapter is None:
        return optimise_file(source, options)
    with scratch_folder() as folder:
        merged = Path(folder) / "merged.onnx"
        try:
            made = merge_onnx(source, [adapter], merged, **given)
        except LoraFxError as e:
            said = e.message.replace(str(merged), str(target))
            raise LoraFxError(said, e.hint, exit_code=e.exit_code) from e
        done = optimise_file(merged, options)
        details = {**made.details, **done.details}
        return replace(done, warnings=(*made.warnings, *done.warnings), details=details)


def _copied(source: Path, graph: OnnxGraph, options: ExportOptions) -> Report:
    """Write a quantised file again, with the bytes of its tensors."""
    before = {n: graph.reader(n) for n in graph.flow.stores}
    with options.output() as made:
        made.save(graph.model, 0 if is_external(source) else options.external_over)
        nothing = Matched({}, {}), Fold({})
        prove_merge(made.seen, options.target, before, set(), find(graph), *nothing)
    said = "a copy: no adapter was given, and none goes into a quantised weight"
    outputs = tuple(map(str, made.files))
    return Report("export", True, (), outputs, (said, *graph.notes), {"mode": "merged"})
