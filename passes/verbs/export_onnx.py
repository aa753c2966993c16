"""export of an .onnx file, from whatever framework: all modes, no torch.

merged   merge, then the stages of optimise where those are asked for
others   the same passes as after a torch export; what they have to equal is the file itself in
ONNX Runtime, with the branches that insert adds
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
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
from lora_fx.passes.verbs.export_files import Writing, beside, named, write_batch, write_switch
from lora_fx.passes.verbs.merge import merge_onnx
from lora_fx.passes.verbs.optimise import optimise_file
from lora_fx.targets.found import Found
from lora_fx.targets.plan import make_plan

Selectors = str | Sequence[str] | None


def export_onnx(
    source: str | PathLike[str],
    how: Writing,
    *,
    adapters: Any = None,
    mode: str = "merged",
    include: Selectors = None,
    exclude: Selectors = None,
    rank: int | None = None,
    scales: bool = False,
    names: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    optimise: bool = False,
    precision: str | None = None,
) -> Report:
    """Write another .onnx file of a file; the options are those of lora_fx.passes.verbs.export.

    Args:
        source: The file; it is not changed.
        how: Where and how to write.
        names: Adapter key → tensor of the file, where the names do not tell.

    Raises:
        LoraFxError: An adapter that does not fit, an option that the mode would ignore.
        NoEffectError: The outputs differ; nothing is written.
    """
    source = Path(source)
    if how.target.resolve() == source.resolve():
        raise LoraFxError(
            f"{how.target}: the output would replace the input", "choose another output"
        )
    if mode == "merged":
        return _merged(source, how, adapters, names, inputs, optimise, precision)
    if mode == "batch":
        adapters = named(adapters)
    elif isinstance(adapters, Adapter):
        adapters = {"adapter": adapters}
    beside(how.target, adapters or {} if mode != "batch" else {}, how.force)
    model = load(source)
    renamed = restore_weight_names(model)
    graph = OnnxGraph(model)
    found = find(graph)
    bound = {n: _bound(n, a, graph, found, names) for n, a in (adapters or {}).items()}
    said = [*graph.notes]
    if renamed:
        said.append(f"{renamed} tensors got the names that the exporter's metadata tells")
    with reference_of(source, graph, how.provider, inputs) as reference:
        rewritten = graph.clone()
        if mode == "batch":
            sources = {p.name: (p.name, StoredWeight(p.shape)) for p in graph.parameters()}
            return write_batch(
                rewritten, reference, sources, bound, how,
                scales=scales, fixed=bool(inputs), warnings=said,
            )  # fmt: skip
        keys = list(dict.fromkeys(k for a in bound.values() for k in a))
        if not keys or include or exclude:
            keys = _planned(found, include, exclude)
        return write_switch(
            rewritten, reference, keys, bound, how,
            load=mode == "load", rank=rank, warnings=said,
        )  # fmt: skip


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
    return replace(adapter, entries=dict(matched.updates), names=None)


def _planned(found: Found, include: Selectors, exclude: Selectors) -> list[str]:
    shapes = {n: n for n in found.shapes}
    return list(make_plan(found, shapes, rank=1, include=include, exclude=exclude).entries)


def _merged(
    source: Path,
    how: Writing,
    adapters: Any,
    names: Mapping[str, str] | None,
    inputs: Mapping[str, Any] | None,
    optimise: bool,
    precision: str | None,
) -> Report:
    """Merge, then optimise; one of the two may be left out."""
    if isinstance(adapters, Mapping):
        raise LoraFxError("merged takes one adapter", "lora-fx merge takes several")
    rewritten = optimise or precision is not None
    if adapters is None and not rewritten:
        raise LoraFxError(
            f"{source} is an .onnx file already, and there is nothing to do",
            "give an adapter, --optimise, --precision or a --mode",
        )
    last: dict[str, Any] = {"force": how.force, "repository": how.repository}
    given: dict[str, Any] = {"names": names, "external_over": how.external_over}
    ran: dict[str, Any] = {"inputs": inputs, "provider": how.provider}
    ran |= {"optimise": optimise, "precision": precision}
    if not rewritten:
        return replace(
            merge_onnx(source, [adapters], how.target, **given, **last), command="export"
        )
    if adapters is None:
        return optimise_file(source, how.target, **ran, **last)
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged.onnx"
        try:
            made = merge_onnx(source, [adapters], merged, **given)
        except LoraFxError as e:
            said = e.message.replace(str(merged), str(how.target))
            raise LoraFxError(said, e.hint, exit_code=e.exit_code) from e
        done = optimise_file(merged, how.target, **ran, **last)
        details = {**made.details, **done.details}
        return replace(done, warnings=(*made.warnings, *done.warnings), details=details)
