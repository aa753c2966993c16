"""export in mode switch: the base graph with switchable targets, proven with every adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fx.adapter import Adapter, bind
from lora_fx.checkpoint.osfile import check_output, replacing
from lora_fx.compare import Parity, Report, rel
from lora_fx.errors import NoEffectError
from lora_fx.fx.capture import Captured
from lora_fx.fx.module import CapturedModule
from lora_fx.fx.tensors import named_tensors
from lora_fx.fx.to_onnx import to_onnx
from lora_fx.lowrank import LowRank, draw
from lora_fx.manifest import Manifest
from lora_fx.onnx.graph import OnnxGraph
from lora_fx.onnx.names import rename_dimensions, restore_weight_names, strip_traces
from lora_fx.onnx.save import output
from lora_fx.onnx.switching import Session, write_adapter
from lora_fx.passes.find import find as find_graph
from lora_fx.passes.given import plain
from lora_fx.passes.pipeline import find, insert, plan_of
from lora_fx.passes.prove import arrays_of, demand, prove
from lora_fx.passes.switch import Switch

Selectors = str | Sequence[str] | None
RANK = 4
"""Of the random adapter that stands in where none is given."""


def export_switch(
    captured: Captured,
    target: Path,
    adapters: Mapping[str, Adapter],
    *,
    include: Selectors,
    exclude: Selectors,
    inputs: Mapping[str, Any] | None,
    provider: str,
    opset: int,
    external_over: int,
    force: bool,
) -> Report:
    """Write the file, and `NAME.onnx_adapter` beside it for every adapter.

    Raises:
        LoraFxError: A target that the exported graph has not; nothing is written.
        NoEffectError: ONNX Runtime differs from torch, or an adapter changes nothing there.
    """
    beside = {name: target.with_name(f"{name}.onnx_adapter") for name in adapters}
    for path in beside.values():
        check_output(path, force=force)
    found = find(captured)
    bound = {name: bind(a, found) for name, a in adapters.items()}
    keys, loose = _keys(captured, bound, include, exclude)
    base = plain(captured)
    base.eval()
    made = to_onnx(base, opset)
    restore_weight_names(made.model, named_tensors(captured.model)[0])
    rename_dimensions(made.model, made.symbols)
    strip_traces(made.model)
    warnings = [str(p) for p in captured.pinned]
    graph = OnnxGraph(made.model)
    here = find_graph(graph)
    if loose:
        left = [k for k in keys if here.get(k) is None]
        warnings += [f"{k}: left out, the exported graph has no such target" for k in left]
        keys = [k for k in keys if k not in left]
    switch = Switch(keys)
    switch(graph)
    manifest = switch.made[0]
    tried = bound or {"random": _random(manifest, found)}
    with output(target, force=force) as made_file:
        made_file.save(graph.model, external_over)
        session = Session(made_file.path, provider)
        parity = prove(session.run, base, arrays=inputs, of="base")
        for name, adapter in tried.items():
            session.load(name, adapter)
            parity += _with(session, captured, name, adapter, inputs, bool(bound), warnings)
        demand(parity, "ONNX Runtime differs from torch")
        for name, path in beside.items():
            with replacing(path, force=force) as part:
                write_adapter(bound[name], manifest, part)
    if session.note:
        warnings.append(session.note)
    outputs = [*made_file.files, *beside.values()]
    sizes = {str(f): f.stat().st_size for f in outputs}
    details = {"files": sizes, "provider": session.provider, "opset": opset, "mode": "switch"}
    details["targets"] = len(manifest.slots)
    return Report("export", True, tuple(parity), tuple(sizes), tuple(warnings), details)


def _keys(
    captured: Captured, bound: Mapping[str, Adapter], include: Selectors, exclude: Selectors
) -> tuple[list[str], bool]:
    """The targets, and whether the default plan chose them (then some may be left out)."""
    if bound and not include and not exclude:
        return list(dict.fromkeys(k for a in bound.values() for k in a)), False
    names = named_tensors(captured.model)[0]
    plan = plan_of(find(captured), names, 1, None, include, exclude, None, None)
    return list(plan.entries), not include


def _random(manifest: Manifest, found: Any) -> Adapter:
    """An update of every target, large enough to see."""
    entries = {}
    for key in manifest.slots:
        layout = found[key].layout
        a, b = draw(key, layout, min(RANK, layout.max_rank), 0, "probe")
        entries[key] = LowRank(a, b, 0.5 * a.shape[-2], layout)
    return Adapter(entries)


def _with(
    session: Session,
    captured: Captured,
    name: str,
    adapter: Adapter,
    inputs: Mapping[str, Any] | None,
    given: bool,
    warnings: list[str],
) -> list[Parity]:
    """The file with one adapter against the torch module with it."""
    reference: CapturedModule = insert(captured, adapter=adapter, dead="allow")

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return session.run(feeds, adapter=name)

    feeds = arrays_of(reference.sample((2, 5), inputs))
    base, changed = session.run(feeds), run(feeds)
    if not any(rel(changed[k], base[k]) > 0 for k in base):
        if not given:
            raise NoEffectError(
                "a random adapter changes nothing in the exported file", "report this model"
            )
        warnings.append(f"the adapter {name!r} changes nothing")
    return prove(run, reference, arrays=inputs, of=name)
