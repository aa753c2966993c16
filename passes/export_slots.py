"""export of a torch model in modes switch, load and batch: the base in ONNX, then its rewrite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import named_tensors
from lora_fx.fx.to_onnx import to_onnx
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.names import rename_dimensions, restore_weight_names, strip_traces
from lora_fx.passes.batch import Source
from lora_fx.passes.export_batch import named, write_batch
from lora_fx.passes.export_switch import beside, write_switch
from lora_fx.passes.given import captured_of, opened
from lora_fx.passes.modes import Writing
from lora_fx.passes.pipeline import find, plan_of
from lora_fx.passes.proofs.reference import TorchReference

Selectors = str | Sequence[str] | None


def export_slots(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    how: Writing,
    *,
    mode: str,
    adapters: Any,
    include: Selectors,
    exclude: Selectors,
    rank: int | None,
    scales: bool,
    inputs: Mapping[str, Any] | None,
    opset: int,
    dynamic: Any,
) -> Report:
    """See lora_fx.passes.export."""
    model = opened(model)
    if isinstance(model, AdaptedModule):
        adapters = model.adapter() if adapters is None else adapters
    elif isinstance(model, CapturedModule):
        raise LoraFxError(
            "this module's weights are folded already", "export the original with adapters=…"
        )
    if mode == "batch":
        adapters = named(adapters)
    elif isinstance(adapters, Adapter):
        adapters = {"adapter": adapters}
    beside(how.target, adapters or {} if mode != "batch" else {}, how.force)
    captured = captured_of(model, args, kwargs, dynamic)
    found = find(captured)
    bound = {name: bind(a, found) for name, a in (adapters or {}).items()}
    reference = TorchReference(captured, inputs)
    graph = _base(reference, opset, tied=mode != "batch")
    said = [str(p) for p in captured.pinned]
    if mode == "batch":
        sources = _sources(reference.base, graph)
        return write_batch(
            graph, reference, sources, bound, how,
            scales=scales, fixed=inputs is not None, warnings=said,
        )  # fmt: skip
    keys, loose = _keys(captured, found, bound, include, exclude)
    return write_switch(
        graph, reference, keys, bound, how, loose=loose, load=mode == "load", rank=rank,
        found=found, warnings=said,
    )  # fmt: skip


def _base(reference: TorchReference, opset: int, *, tied: bool) -> OnnxGraph:
    """The model in ONNX, its own names on weights and dimensions."""
    made = to_onnx(reference.base, opset)
    names = named_tensors(reference.captured.model)[0] if tied else None
    restore_weight_names(made.model, names)
    rename_dimensions(made.model, made.symbols)
    strip_traces(made.model)
    return OnnxGraph(made.model)


def _keys(
    captured: Captured,
    found: Any,
    bound: Mapping[str, Adapter],
    include: Selectors,
    exclude: Selectors,
) -> tuple[list[str], bool]:
    """The targets, and whether the default plan chose them (then some may be left out)."""
    if bound and not include and not exclude:
        return list(dict.fromkeys(k for a in bound.values() for k in a)), False
    names = named_tensors(captured.model)[0]
    plan = plan_of(found, names, 1, None, include, exclude, None, None)
    return list(plan.entries), not include


def _sources(base: CapturedModule, graph: OnnxGraph) -> dict[str, tuple[str, Source]]:
    """Which parameter each stored tensor is, by name; by its value, whether it is transposed."""
    torch_side = base.graph(False)
    names = {n: p for p in torch_side.parameters() for n in (p.name, *p.aliases)}
    result: dict[str, tuple[str, Source]] = {}
    for stored in graph.parameters():
        stem, _, number = stored.name.rpartition(".")
        p = names.get(stored.name) or (names.get(stem) if number.isdigit() else None)
        if p is None or len(p.shape) < 2:
            continue
        ours, theirs = graph.read(stored.name), torch_side.read(p.name)
        if ours.shape == theirs.shape and np.array_equal(ours, theirs):
            result[stored.name] = (p.name, Source(p.shape))
        elif theirs.ndim == 2 and ours.shape == theirs.T.shape and np.array_equal(ours, theirs.T):
            result[stored.name] = (p.name, Source(p.shape, turned=True))
    return result
