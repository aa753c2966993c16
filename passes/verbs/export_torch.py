"""export in mode merged: the folded eval graph as an ONNX file, proven before it gets its name."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.compare import FOLD_TOL, ORT_TOL, Parity, Report, compare, demand
from lora_fx.dtypes import Array
from lora_fx.errors import CaptureError, LoraFxError
from lora_fx.fx.capture.call import onnx_conditions
from lora_fx.fx.capture.capture import Captured, as_it_was
from lora_fx.fx.codes import beside, forms
from lora_fx.fx.module.adapted import AdaptedModule, Base
from lora_fx.fx.module.module import CapturedModule, plain
from lora_fx.fx.tensors import (
    from_numpy,
    named_tensors,
    parameter_of,
    replace_parameter,
    to_numpy,
    with_base,
)
from lora_fx.fx.to_onnx import OPSET, to_onnx
from lora_fx.ir.graph import Site
from lora_fx.onnx.batch import batch_symbol
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.names import copies_of, mark_changed, mask_by_infinity
from lora_fx.onnx.precision import GATES, at_level, in_bfloat16, narrow, unround, widen
from lora_fx.onnx.session import open_session
from lora_fx.onnx.stages import RewriteStage
from lora_fx.passes.batch import StoredWeight
from lora_fx.passes.fold import said_of_zeros
from lora_fx.passes.proofs.onnx_reference import FileRerun
from lora_fx.passes.proofs.parity import guards, prove, rows_of, torch_rerun, torch_run
from lora_fx.passes.proofs.proof_inputs import feeds_of
from lora_fx.passes.proofs.torch_reference import TorchReference
from lora_fx.passes.verbs import export_files as files
from lora_fx.passes.verbs.adapt import find, fold, insert
from lora_fx.passes.verbs.open import captured_again, captured_of, opened, own_adapters
from lora_fx.passes.verbs.options import ExportAdapters, ExportOptions
from lora_fx.passes.verbs.quantise import Wanted, quantised
from lora_fx.targets.target import Target, applies, own_use, split_region, split_use
from lora_fx.text import Json, free_name, some


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
    exported, said = _translated(folded, options, level=options.accuracy_level)
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
        model, stages = files.optimised(model, feeds, provider)
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


def level_gate(options: ExportOptions) -> float:
    """The gate of the level that products over codes compute at."""
    return options.tol or GATES.get(f"level {options.accuracy_level}", ORT_TOL)


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
            raise _folded()
        return model
    cap = captured_of(model, options.capture_of_base())
    return plain(cap) if adapter is None else insert(cap, adapter=adapter, dead="allow")


def quantised_base(
    model: object, options: ExportOptions, wanted: Wanted
) -> tuple[Captured, ExportAdapters | None, list[str]]:
    """The quantised capture of what export is given, the adapters that ride on it, and notes.

    A module that insert returned brings its own adapter where none are given.
    """
    model = opened(model)
    adapters = own_adapters(model, options.adapters)
    every = [*files.named(adapters).values()] if adapters else []
    cap = captured_of(model, options.capture_of_base())
    new = quantised(cap, wanted, {name for a in every for name in a.full})
    with torch.no_grad():
        before, after = (plain(c).flat(c.named) for c in (cap, new))
    off = compare(after, before, {}, 1.0).rel
    new.notes.append(f"quantising moves the base's outputs by {off:.1e} of the largest")
    base = Base()
    for i, adapter in enumerate(every, 1):
        base.check(adapter.metadata, new.model, f"adapter {i}" if len(every) > 1 else "the adapter")
    new.notes += base.said
    return new, adapters, new.notes[len(cap.notes) :]


def _folded() -> LoraFxError:
    return LoraFxError(
        "this module's weights are folded already", "export the original with adapters=…"
    )


WIDENED = "the file is in float32: the model's bfloat16 numbers are kept, its rounding is not"


# export of a torch model in modes switch, load and batch: the base in ONNX, then its rewrite.


def export_slots(model: object, options: ExportOptions) -> Report:
    """See lora_fx.passes.verbs.export."""
    model = opened(model)
    if isinstance(model, CapturedModule) and not isinstance(model, AdaptedModule):
        raise _folded()
    options = replace(options, adapters=own_adapters(model, options.adapters))
    adapters = files.by_name(options)
    captured = captured_of(model, options.capture_of_base())
    found = find(captured)
    bound = {n: bind(with_base(a, captured.model), found) for n, a in adapters.items()}
    whole: list[str] = []
    if options.mode == "switch" and len(bound) == 1:
        captured, bound, whole = _with_whole(captured, bound)
        found = find(captured) if whole else found
    reference = torch_reference(captured, options, level_gate(options))
    if options.mode == "batch":
        every = dict.fromkeys(k for a in bound.values() for k in a.lowrank)
        wanted = dict.fromkeys(split_region(k)[0] if split_use(k)[1] else k for k in every)
        graph, keys_of, said = base_of(reference, [*wanted], options)
        sources = _sources(reference.base, graph, keys_of)
        batch_symbol(graph.model, *_without_batch(captured))
        return files.write_batch(graph, reference, sources, bound, options, said)
    keys, loose = options.chosen(found, bound)
    graph, _, said = base_of(reference, keys, options)
    said += whole
    at_level(graph.model, options.accuracy_level)
    return files.write_switch(
        graph, reference, keys, bound, options, said, loose=loose, found=found
    )


def _with_whole(
    captured: Captured, adapters: Mapping[str, Adapter]
) -> tuple[Captured, dict[str, Adapter], list[str]]:
    """A capture of the base with the whole tensors of an adapter, the rest of it, and a note.

    A slot holds a low-rank update, so a head that was trained whole is part of the base.
    """
    ((name, adapter),) = adapters.items()
    first, aliases = named_tensors(captured.model)
    tied = [key for key in adapter.full if aliases.get(first.get(key, key))]
    if not adapter.full or tied:  # of a tied one, one use alone may be meant
        return captured, dict(adapters), []
    based = copy.copy(captured)
    based.model = beside(captured.model)
    traced = captured.tracings.items()
    based.tracings = {k: [replace(t, analyses={}) for t in v] for k, v in traced}
    for key, full in adapter.full.items():
        old = parameter_of(based.model, first.get(key, key))
        value = from_numpy(full.value).to(old.device, old.dtype)
        replace_parameter(based.model, old, torch.nn.Parameter(value, old.requires_grad))
    kept = replace(adapter, entries={**adapter.lowrank})
    note = (
        f"{name}: its whole tensors are folded into the base ({some(sorted(adapter.full))}): the "
        "file has them without an adapter too"
    )
    return based, {name: kept}, [note]


def _without_batch(captured: Captured) -> tuple[str, str]:
    """Why the inputs of a capture may share no dynamic dimension 0, and what to do then."""
    specs = [s for s in captured.inputs.specs if s.shape]
    pinned = {p.input: str(p) for p in captured.pinned if p.dim == 0}
    asked = [s.name for s in specs if 0 not in s.dims and s.name not in pinned]
    if asked:
        names = ", ".join(asked)
        return "", f"leave dimension 0 of {names} dynamic: drop --static, or --dynamic NAME:0=batch"
    if pinned:
        return next(iter(pinned.values())), "use mode merged or switch"
    names = ", ".join(s.name for s in specs)
    return "", f"one symbol for all of {names}: --dynamic NAME:0=batch for each"


def torch_reference(
    captured: Captured, options: ExportOptions, tol: float = ORT_TOL
) -> TorchReference:
    """What a file has to equal, where adapters are the branches that insert adds."""

    def branched(adapter: Adapter) -> CapturedModule:
        return insert(captured, adapter=adapter, dead="allow")

    return TorchReference(captured, branched, options.inputs, tol)


def base_of(
    reference: TorchReference, keys: Sequence[str], options: ExportOptions
) -> tuple[OnnxGraph, dict[str, tuple[str, ...]], list[str]]:
    """The base in ONNX with a target for every key that can have one.

    In mode batch a key of one use has it apart, whatever the file can tell.

    Returns:
        It, the keys that reach each weight that it has apart, and what has to be said.
    """
    model, said = _translated(reference.base, options)
    graph = OnnxGraph(model)
    apart, keys_of = _by_keys(_lost(reference, graph, keys, single=options.mode == "batch"))
    if apart:
        graph = OnnxGraph(_translated(reference.base, options, apart=apart)[0])
    return graph, keys_of, [*map(str, reference.base.captured.pinned), *said]


def _lost(
    reference: TorchReference, graph: OnnxGraph, keys: Sequence[str], *, single: bool
) -> dict[str, Target]:
    """Targets that the exporter lost: it computed from their weight, or has no such use of it.

    With `single` those of single uses too: the file does not say which module a use is of.
    """
    here = find(graph)
    lost = [k for k in keys if here.get(k) is None or (single and split_use(k)[1])]
    known = find(reference.base.graph(False, portable=True)) if lost else here
    apart: dict[str, Target] = {}
    for key in lost:
        target = known.get(key)
        if target is not None and not target.other_readers and not key.endswith("]"):
            sites = tuple(s for s in target.sites if applies(own_use(key), s))
            apart |= {key: replace(target, sites=sites)} if sites else {}
    return apart


def _by_keys(lost: Mapping[str, Target]) -> tuple[dict[str, Target], dict[str, tuple[str, ...]]]:
    """The uses that the same keys reach, under a name for their copy, and these keys.

    Keys of several adapters may share uses: `w@head.weight` and `w@op:linear`.
    """
    groups: dict[tuple[str, ...], dict[str, Site]] = {}
    for site in (s for t in lost.values() for s in t.sites):
        reach = tuple(k for k, t in lost.items() if site in t.sites)
        groups.setdefault(reach, {})[site.id] = site
    apart: dict[str, Target] = {}
    keys_of: dict[str, tuple[str, ...]] = {}
    for reach, sites in groups.items():
        name = free_name(reach[0], apart)
        apart[name] = replace(lost[reach[0]], sites=tuple(sites.values()))
        keys_of[name] = reach
    return apart, keys_of


def _translated(
    module: CapturedModule,
    options: ExportOptions,
    *,
    level: int = 0,
    apart: Mapping[str, Target] | None = None,
) -> tuple[Any, list[str]]:
    """A module in ONNX, in a dtype that the runtime has, and what has to be said of that."""
    model = to_onnx(module, options.opset or OPSET, apart, repeat=options.capture.repeat)
    at_level(model, level)
    mask_by_infinity(model)
    if options.precision != "bfloat16":
        return model, [WIDENED] * widen(model)
    if not in_bfloat16(model):
        raise LoraFxError("the model has no bfloat16 to keep", "float16 or int8 takes fewer bits")
    return model, ["bfloat16: ONNX Runtime's CPU has few ops for it"]


def _sources(
    base: CapturedModule, graph: OnnxGraph, keys_of: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, StoredWeight]]:
    """Which parameter each stored tensor is, by name; by its value, whether it is transposed."""
    torch_side, held = base.graph(False), forms(base)
    names = {n: p for p in torch_side.parameters() for n in p.names}
    result: dict[str, tuple[str, StoredWeight]] = {}
    for stored in graph.parameters():
        if alone := keys_of.keys() & {*stored.names}:
            name = alone.pop()
            result[stored.name] = (name, StoredWeight(stored.shape, keys=keys_of[name]))
            continue
        p = names.get(stored.name)
        if p is None or len(p.shape) < 2:
            continue
        if p.format:
            # rows of codes are [out, in], however the parameter lies
            turned = held[p.name].turned
        else:
            ours, theirs = graph.read(stored.name), torch_side.read(p.name)
            turned = not np.array_equal(ours, theirs)
            if turned and not (theirs.ndim == 2 and np.array_equal(ours, theirs.T)):
                continue
        result[stored.name] = (p.name, StoredWeight(p.shape, turned=turned))
    return result


# A second try with eager attention, where a model of transformers offers it.
#
# Some kernels of attention cannot be traced, or have no translation; the plain products of `eager`
# compute the same. The model itself is as it was afterwards.


REFUSED = "torch's ONNX exporter refused the model"
"""How errors of the translation begin."""


def may_help(model: object, error: LoraFxError) -> bool:
    """True where the model could not be captured or translated, and has another attention."""
    source = model.model if isinstance(model, Captured) else model
    now = getattr(getattr(source, "config", None), "_attn_implementation", "eager")
    failed = isinstance(error, CaptureError) or error.message.startswith(REFUSED)
    return failed and now not in (None, "eager") and hasattr(source, "set_attn_implementation")


@contextlib.contextmanager
def eager(model: Any) -> Iterator[Any]:
    """The model with eager attention while the block runs; a capture is one of it, anew."""
    source: Any = model.model if isinstance(model, Captured) else model
    was = source.config._attn_implementation
    source.set_attn_implementation("eager")
    try:
        if isinstance(model, Captured):
            model = captured_again(model, source)
        yield model
    finally:
        source.set_attn_implementation(was)
