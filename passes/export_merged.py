"""export in mode merged: the folded eval graph as an ONNX file, proven before it gets its name."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import FOLD_TOL, ORT_TOL, Parity, Report, demand
from lora_fx.errors import LoraFxError
from lora_fx.fx.graph.flow import tensor
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule, plain
from lora_fx.fx.tensors import named_tensors, to_numpy
from lora_fx.fx.to_onnx import to_onnx
from lora_fx.onnx.names import (
    mark_changed,
    rename_dimensions,
    restore_weight_names,
    strip_traces,
)
from lora_fx.onnx.optimise.precision import GATES
from lora_fx.onnx.optimise.stages import Stage
from lora_fx.onnx.session import open_session
from lora_fx.passes.given import captured_of, opened
from lora_fx.passes.modes import Writing
from lora_fx.passes.optimise import narrowed
from lora_fx.passes.optimise import optimise as optimised
from lora_fx.passes.pipeline import fold, grown, insert
from lora_fx.passes.proofs.parity import prove, torch_run


def export_merged(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    how: Writing,
    *,
    adapters: Any,
    inputs: Mapping[str, Any] | None,
    opset: int,
    dynamic: Any,
    optimise: bool,
    precision: str | None,
) -> Report:
    """See lora_fx.passes.export."""
    if isinstance(adapters, Mapping):
        raise LoraFxError("merged takes one adapter", "lora_fx.mix makes one of several")
    branched = _branched(model, args, kwargs, adapters, dynamic)
    mode_before = branched.training
    branched.eval()
    try:
        return _write(branched, how, inputs, opset, optimise, precision)
    finally:
        if mode_before:
            branched.train()


def _write(
    branched: CapturedModule,
    how: Writing,
    inputs: Mapping[str, Any] | None,
    opset: int,
    optimise: bool,
    precision: str | None,
) -> Report:
    """Fold, prove, translate, prove, and give the file its name."""
    folded = fold(branched) if isinstance(branched, AdaptedModule) else branched
    warnings: list[str] = [str(p) for p in branched.captured.pinned]
    parity: list[Parity] = []
    if isinstance(branched, AdaptedModule) and not branched.changes_anything():
        warnings.append("the adapter changes nothing: every update is zero")
    if folded is not branched:
        parity += prove(torch_run(folded), branched, arrays=inputs, tol=FOLD_TOL, of="fold")
        demand(parity, "the fold differs from the unfolded model")
    made = to_onnx(folded, opset)
    restore_weight_names(made.model, named_tensors(branched.captured.model)[0])
    values = {n: partial(_value, folded, n) for n in named_tensors(folded)[0]}
    mark_changed(made.model, values)
    rename_dimensions(made.model, made.symbols)
    strip_traces(made.model)
    model = made.model
    stages: list[Stage] = []
    if optimise:
        model, stages = optimised(model, branched, inputs, how.provider)
        mark_changed(model, values)
    tol = ORT_TOL
    if precision:
        made_of = narrowed(model, branched, inputs, how.provider, precision)
        model, tol = made_of.model, GATES[precision]
        warnings.append(made_of.said(precision))
    with how.output() as made_file:
        made_file.save(model, how.external_over)
        session = open_session(made_file.path, how.provider)
        runtime = prove(session.run, branched, arrays=inputs, tol=tol, of="onnxruntime")
        if any(s.kept for s in stages) and not precision and not all(p.ok for p in runtime):
            # each stage was near the exported graph, but together they are too far from torch
            why = "the stages together differ from torch"
            stages = [replace(s, kept=False, why=s.why or why) for s in stages]
            model = made.model
            made_file.save(model, how.external_over)
            session = open_session(made_file.path, how.provider)
            runtime = prove(session.run, branched, arrays=inputs, of="onnxruntime")
        demand(runtime, "ONNX Runtime differs from torch")
    if session.note:
        warnings.append(session.note)
    lost = [f for f in getattr(folded, "folded", ()) if f.kept < 0.95]
    warnings += [f"{f.parameter}: rounding kept {f.kept:.1%} of the change" for f in lost]
    sizes = {str(f): f.stat().st_size for f in made_file.files}
    return Report(
        "export",
        True,
        (*parity, *runtime),
        tuple(sizes),
        tuple(warnings),
        {
            "files": sizes,
            "provider": session.provider,
            "opset": opset,
            "mode": "merged",
            "nodes": sum(1 for _ in model.graph.all_nodes()),
            "grown_bytes": grown(getattr(folded, "folded", ())),
            **({"stages": [s.to_json() for s in stages]} if optimise else {}),
        },
    )


def _branched(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    adapter: Adapter | None,
    dynamic: Any,
) -> CapturedModule:
    """The unfolded module that the file has to equal."""
    model = opened(model)
    if isinstance(model, AdaptedModule):
        if adapter is None:
            return model
        own: AdaptedModule = copy.deepcopy(model)  # the caller's adapter stays
        own.load_adapter(adapter)
        return own
    if isinstance(model, CapturedModule):
        if adapter is not None:
            raise LoraFxError(
                "this module's weights are folded already", "export the original with adapters=…"
            )
        return model
    cap = captured_of(model, args, kwargs, dynamic)
    return plain(cap) if adapter is None else insert(cap, adapter=adapter, dead="allow")


def _value(module: CapturedModule, name: str) -> Any:
    return to_numpy(tensor(module, name))
