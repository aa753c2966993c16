"""export in mode merged: the folded eval graph as an ONNX file, proven before it gets its name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.compare import FOLD_TOL, Parity, Report, demand
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import onnx_conditions
from lora_fx.fx.capture.capture import as_it_was
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule, plain
from lora_fx.fx.tensors import (
    named_tensors,
    parameter_of,
    to_numpy,
    with_base,
)
from lora_fx.fx.to_onnx import OPSET
from lora_fx.onnx.names import copies_of, mark_changed
from lora_fx.onnx.precision import GATES, narrow, unround
from lora_fx.onnx.session import open_session
from lora_fx.onnx.stages import RewriteStage
from lora_fx.passes.fold import said_of_zeros
from lora_fx.passes.proofs.parity import (
    feeds_of,
    guards,
    prove,
    rows_of,
    torch_rerun,
    torch_run,
)
from lora_fx.passes.proofs.reference import FileRerun
from lora_fx.passes.verbs import export_files as files
from lora_fx.passes.verbs import export_optimised
from lora_fx.passes.verbs.adapt import find, fold, insert
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.export_torch import WIDENED, folded_already, level_gate, translated
from lora_fx.passes.verbs.open import captured_of, opened
from lora_fx.text import Json


def export_merged(model: object, options: ExportOptions) -> Report:
    """See lora_fx.passes.verbs.export."""
    branched = _branched(model, options)
    with as_it_was(branched):
        return _write(branched, options)


def _write(branched: CapturedModule, options: ExportOptions) -> Report:
    """Fold, prove, translate, prove, and give the file its name."""
    inputs, provider, precision = options.inputs, options.provider, options.precision
    folded, parity = branched, list[Parity]()
    warnings: list[str] = [str(p) for p in branched.captured.pinned]
    if isinstance(branched, AdaptedModule):
        folded = fold(branched)
        if not branched.changes_anything():
            warnings.append("the adapter changes nothing: every update is zero")
        parity += prove(
            torch_run(folded), branched, arrays=inputs, tol=FOLD_TOL, of="fold",
            rerun=torch_rerun(folded),
        )  # fmt: skip
        demand(parity, "the fold differs from the unfolded model")
    exported, said = translated(folded, options, level=options.accuracy_level)
    warnings += said
    values: dict[str, Callable[[], Array]] = {
        n: partial(to_numpy, parameter_of(folded, n)) for n in named_tensors(folded)[0]
    }
    wide: frozenset[str] = frozenset()
    if WIDENED in said:
        unrounded = _unrounded(folded, options)
        wide = unround(exported, unrounded, copies_of(exported))
        values |= {name: unrounded[name] for name in wide}
        narrow_still = [name for name in unrounded if name not in wide]
        warnings += [f"{name}: rounded to bfloat16 on the way" for name in narrow_still]
    mark_changed(exported, values)
    model = exported
    conditions = onnx_conditions(branched.conditions())
    stages: list[RewriteStage] = []
    wanted = feeds_of(branched, inputs) if options.optimise or precision in GATES else ()
    feeds = [f for _, f, extra in wanted if not extra]
    if options.optimise:
        model, stages = export_optimised.optimised(model, feeds, provider)
        mark_changed(model, values)
    tol = level_gate(options)
    if precision in GATES:
        made_of = narrow(model, precision, feeds, provider, options.tol)
        model, tol = made_of.model, options.tol or GATES[precision]
        warnings.append(made_of.said(precision))
    with options.output() as made_file:
        for model in (model, exported):  # noqa: B020
            told = files.save_within(made_file, model, conditions, guards(branched), options)
            session = open_session(made_file.path, provider)
            rerun = FileRerun(made_file.path, provider)
            runtime = prove(
                session.run, branched, arrays=inputs, tol=tol, of="onnxruntime", rerun=rerun
            )
            rewritten = any(s.kept for s in stages) and precision not in GATES
            if not rewritten or all(p.ok for p in runtime):
                break
            # each stage was near the exported graph, but together they are too far from torch
            why = "the stages together differ from torch"
            stages = [replace(s, kept=False, why=s.why or why) for s in stages]
        demand(runtime, "ONNX Runtime differs from torch")
    warnings += [*told, *filter(None, [session.note])]
    changes = getattr(folded, "folded", ())
    warnings += [*said_of_zeros(changes), *(f.said for f in changes if f.said)]
    warnings += [
        f"{f.parameter}: rounding kept {f.kept:.1%} of the change"
        for f in changes
        if f.kept < 0.95 and f.stored_as not in wide
    ]
    nodes = sum(1 for _ in model.graph.all_nodes())
    grown = sum(f.grew for f in changes)
    opset = options.opset or OPSET
    details: Json = {"opset": opset, "mode": "merged", "nodes": nodes, "grown_bytes": grown}
    details |= rows_of(branched.captured)
    if options.optimise:
        details["stages"] = [s.to_json() for s in stages]
    parity += runtime
    return files.report_of(made_file.files, session.provider, parity, warnings, details)


def _unrounded(folded: CapturedModule, options: ExportOptions) -> dict[str, Callable[[], Array]]:
    """Name of a tensor that changed → its value before it was rounded to the model's dtype."""
    result: dict[str, Callable[[], Array]] = dict(getattr(folded, "unrounded", {}))
    if isinstance(options.adapters, Adapter):
        # the module holds whole tensors in its own dtype, and the adapter as they were trained
        captured = folded.captured
        bound = bind(with_base(options.adapters, captured.model), find(captured))
        result |= {name: partial(np.asarray, full.value) for name, full in bound.full.items()}
    return result


def _branched(model: object, options: ExportOptions) -> CapturedModule:
    """The unfolded module that the file has to equal."""
    adapter = options.adapters
    if adapter is not None and not isinstance(adapter, Adapter):
        raise LoraFxError(
            "merged takes one adapter", "lora_fx.adapter.adapter.mix makes one of several"
        )
    model = opened(model)
    if isinstance(model, AdaptedModule):
        if adapter is None:
            return model
        own: AdaptedModule = copy.deepcopy(model)  # the caller's adapter stays
        own.load_adapter(adapter)
        return own
    if isinstance(model, CapturedModule):
        if adapter is not None:
            raise folded_already()
        return model
    cap = captured_of(model, options.capture_of_base())
    return plain(cap) if adapter is None else insert(cap, adapter=adapter, dead="allow")
