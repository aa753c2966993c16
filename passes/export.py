"""export: the folded eval graph as an ONNX file, proven equal before it gets its name."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from lora_fx.adapter import Adapter
from lora_fx.checkpoint.osfile import check_output
from lora_fx.compare import FOLD_TOL, Parity, Report
from lora_fx.errors import LoraFxError
from lora_fx.fx.adapted import AdaptedModule
from lora_fx.fx.capture import Captured
from lora_fx.fx.flow import tensor
from lora_fx.fx.module import CapturedModule
from lora_fx.fx.tensors import named_tensors, to_numpy
from lora_fx.fx.to_onnx import OPSET, to_onnx
from lora_fx.onnx.names import (
    mark_changed,
    rename_dimensions,
    restore_weight_names,
    strip_traces,
)
from lora_fx.onnx.save import EXTERNAL_OVER, output
from lora_fx.onnx.session import open_session
from lora_fx.onnx.stages import Stage
from lora_fx.passes.given import captured_of, opened, plain
from lora_fx.passes.optimise import optimise as optimised
from lora_fx.passes.pipeline import fold, grown, insert
from lora_fx.passes.prove import demand, prove, torch_run


def export(
    model: Any,
    path: str | PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    adapters: Any = None,
    mode: str = "merged",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    scales: bool = False,
    inputs: Mapping[str, Any] | None = None,
    provider: str = "auto",
    opset: int = OPSET,
    external_over: int = EXTERNAL_OVER,
    dynamic: Any = None,
    force: bool = False,
    optimise: bool = False,
) -> Report:
    """Write an ONNX file of a model with an adapter folded in, or with switchable targets.

    In mode merged the fold is compared with the unfolded module, and ONNX Runtime's outputs with
    the unfolded module's, at three sizes; only then the file gets its name.

    Args:
        model: A module that insert returned (its adapter is folded), a module or a Captured.
        path: Where to write; `PATH.data` beside it when the weights are large.
        args: Example inputs, for a model that is not captured yet.
        kwargs: Example inputs by keyword.
        adapters: What to fold instead; for switch and batch {name: adapter} (for batch also a
            list). Those of switch are written beside the file as `NAME.onnx_adapter`.
        mode: merged; switch: adapters are chosen run by run (lora_fx.onnx.Session); batch: one
            graph whose rows use different adapters (docs/export.md).
        include: Of switch: targets, instead of the adapters' or the default plan's.
        exclude: Of switch: targets to leave out.
        scales: Of batch: add an input of weights by row.
        inputs: Arrays by input name for the check, instead of sampled ones.
        provider: auto, cpu or cuda.
        opset: ONNX operator set.
        external_over: Bytes of weights above which they go to a file of their own.
        dynamic: As in capture.
        force: Replace an existing file.
        optimise: Rewrite the graph for ONNX Runtime, every stage kept only where it is proven.

    Raises:
        NoEffectError: The outputs differ; nothing is written.
    """
    _meant(mode, switch=include or exclude, batch=scales, merged=optimise)
    if mode == "batch":
        from lora_fx.passes.export_batch import export_batch

        return export_batch(
            model,
            path,
            args,
            kwargs,
            adapters=adapters,
            scales=scales,
            inputs=inputs,
            provider=provider,
            opset=opset,
            external_over=external_over,
            dynamic=dynamic,
            force=force,
        )
    check_output(path, force=force)
    if mode == "switch":
        from lora_fx.passes.export_switch import export_switch

        captured, several = _switchable(model, args, kwargs, adapters, dynamic)
        return export_switch(
            captured,
            Path(path),
            several,
            include=include,
            exclude=exclude,
            inputs=inputs,
            provider=provider,
            opset=opset,
            external_over=external_over,
            force=force,
        )
    if isinstance(adapters, Mapping):
        raise LoraFxError("merged takes one adapter", "lora_fx.mix makes one of several")
    branched = _branched(model, args, kwargs, adapters, dynamic)
    mode_before = branched.training
    branched.eval()
    try:
        return _write(
            branched, Path(path), mode, inputs, provider, opset, external_over, force, optimise
        )
    finally:
        if mode_before:
            branched.train()


def _write(
    branched: CapturedModule,
    target: Path,
    mode: str,
    inputs: Mapping[str, Any] | None,
    provider: str,
    opset: int,
    external_over: int,
    force: bool,
    optimise: bool,
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
    tensors = named_tensors(folded)[0]
    mark_changed(made.model, {n: partial(_value, folded, n) for n in tensors})
    rename_dimensions(made.model, made.symbols)
    strip_traces(made.model)
    model = made.model
    stages: list[Stage] = []
    if optimise:
        model, stages = optimised(model, branched, inputs, provider)
    with output(target, force=force) as made_file:
        made_file.save(model, external_over)
        session = open_session(made_file.path, provider)
        runtime = prove(session.run, branched, arrays=inputs, of="onnxruntime")
        if any(s.kept for s in stages) and not all(p.ok for p in runtime):
            # each stage was near the exported graph, but together they are too far from torch
            why = "the stages together differ from torch"
            stages = [replace(s, kept=False, why=s.why or why) for s in stages]
            model = made.model
            made_file.save(model, external_over)
            session = open_session(made_file.path, provider)
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
            "mode": mode,
            "nodes": sum(1 for _ in model.graph.all_nodes()),
            "grown_bytes": grown(getattr(folded, "folded", ())),
            **({"stages": [s.to_json() for s in stages]} if optimise else {}),
        },
    )


OPTIONS = {"switch": "include and exclude", "batch": "scales", "merged": "optimise"}


def _meant(mode: str, **given: Any) -> None:
    """Raise for an option that the mode would ignore."""
    if mode not in OPTIONS:
        raise LoraFxError(f"no mode {mode!r}", "merged, switch or batch")
    for name, value in given.items():
        if value and name != mode:
            raise LoraFxError(
                f"mode {mode} would ignore what is for mode {name}: {OPTIONS[name]}", "leave it out"
            )


def _switchable(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    adapters: Adapter | Mapping[str, Adapter] | None,
    dynamic: Any,
) -> tuple[Captured, Mapping[str, Adapter]]:
    """The capture of the base model, and the adapters by name."""
    model = opened(model)
    if isinstance(model, AdaptedModule):
        adapters = {"adapter": model.adapter()} if adapters is None else adapters
    elif isinstance(model, CapturedModule) and hasattr(model, "folded"):
        raise LoraFxError(
            "this module's weights are folded already", "export the original with adapters=…"
        )
    if isinstance(adapters, Adapter):
        adapters = {"adapter": adapters}
    return captured_of(model, args, kwargs, dynamic), adapters or {}


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
