"""export of an .onnx file, from whatever framework: all modes, no torch.

merged   merge, then the stages of optimise where those are asked for
others   the same passes as after a torch export; what they have to equal is the file itself in
ONNX Runtime, with the branches that insert adds
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.match import match
from lora_fx.onnx.names import restore_weight_names
from lora_fx.passes.batch import StoredWeight
from lora_fx.passes.find import find
from lora_fx.passes.proofs.reference import reference_of
from lora_fx.passes.verbs.export_files import by_name, write_batch, write_switch
from lora_fx.passes.verbs.merge import merge_onnx
from lora_fx.passes.verbs.optimise import optimise_file
from lora_fx.passes.verbs.options import ExportOptions
from lora_fx.targets.found import Found


def export_onnx(source: str | PathLike[str], options: ExportOptions) -> Report:
    """Write another .onnx file of a file, which is not changed; see lora_fx.passes.verbs.export.

    Raises:
        LoraFxError: An adapter that does not fit, an option that the mode would ignore.
        NoEffectError: The outputs differ; nothing is written.
    """
    source = Path(source)
    if options.target.resolve() == source.resolve():
        raise LoraFxError(
            f"{options.target}: the output would replace the input", "choose another output"
        )
    if options.mode == "merged":
        return _merged(source, options)
    adapters = by_name(options)
    model = load(source)
    renamed = restore_weight_names(model)
    graph = OnnxGraph(model)
    found = find(graph)
    bound = {n: _bound(n, a, graph, found, options.names) for n, a in adapters.items()}
    said = [*graph.notes]
    if renamed:
        said.append(f"{renamed} tensors got the names that the exporter's metadata tells")
    with reference_of(source, graph, options.provider, options.inputs) as reference:
        rewritten = graph.clone()
        if options.mode == "batch":
            sources = {p.name: (p.name, StoredWeight(p.shape)) for p in graph.parameters()}
            fixed = bool(options.inputs)
            return write_batch(
                rewritten, reference, sources, bound, options, fixed=fixed, warnings=said
            )
        keys, _ = options.chosen(found, bound)
        return write_switch(rewritten, reference, keys, bound, options, warnings=said)


def _bound(
    name: str, adapter: Adapter, graph: OnnxGraph, found: Found, names: Mapping[str, str] | None
) -> Adapter:
    """An adapter in the keys and layouts of the graph."""
    matched = match(adapter, graph, found, names)
    if matched.whole:
        raise LoraFxError(
            f"{name}: it holds the whole tensor {min(matched.whole)!r}; expected s·b·a",
            "lora-fx merge folds whole tensors",
        )
    metadata = {k: v for k, v in adapter.metadata.items() if k != "naming"}
    return replace(adapter, entries=dict(matched.updates), metadata=metadata)


def _merged(source: Path, options: ExportOptions) -> Report:
    """Merge, then optimise; one of the two may be left out."""
    adapter, target = options.adapters, options.target
    if isinstance(adapter, Mapping):
        raise LoraFxError("merged takes one adapter", "lora-fx merge takes several")
    rewritten = options.optimise or options.precision is not None
    if adapter is None and not rewritten:
        raise LoraFxError(
            f"{source} is an .onnx file already, and there is nothing to do",
            "give an adapter, --optimise, --precision or a --mode",
        )
    last: dict[str, Any] = {"force": options.force, "repository": options.repository}
    given: dict[str, Any] = {"names": options.names, "external_over": options.external_over}
    ran: dict[str, Any] = {
        name: getattr(options, name) for name in ("inputs", "provider", "optimise", "precision")
    }
    if not rewritten:
        return replace(merge_onnx(source, [adapter], target, **given, **last), command="export")
    if adapter is None:
        return optimise_file(source, target, **ran, **last)
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged.onnx"
        try:
            made = merge_onnx(source, [adapter], merged, **given)
        except LoraFxError as e:
            said = e.message.replace(str(merged), str(target))
            raise LoraFxError(said, e.hint, exit_code=e.exit_code) from e
        done = optimise_file(merged, target, **ran, **last)
        details = {**made.details, **done.details}
        return replace(done, warnings=(*made.warnings, *done.warnings), details=details)
