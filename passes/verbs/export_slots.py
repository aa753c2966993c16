"""export of a torch model in modes switch, load and batch: the base in ONNX, then its rewrite."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.compare import ORT_TOL, Report
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.codes import beside, forms
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import (
    from_numpy,
    named_tensors,
    parameter_of,
    replace_parameter,
    with_base,
)
from lora_fx.ir.graph import Site
from lora_fx.onnx.batch import batch_symbol
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.precision import at_level
from lora_fx.passes.batch import StoredWeight
from lora_fx.passes.proofs.parity import (
    TorchReference,
)
from lora_fx.passes.verbs import export_batch, export_switch
from lora_fx.passes.verbs import export_files as files
from lora_fx.passes.verbs.adapt import find, insert
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.export_torch import folded_already, level_gate, translated
from lora_fx.passes.verbs.open import captured_of, opened, own_adapters
from lora_fx.targets.target import Target, applies, own_use, split_region, split_use
from lora_fx.text import free_name, some


def export_slots(model: object, options: ExportOptions) -> Report:
    """See lora_fx.passes.verbs.export."""
    model = opened(model)
    if isinstance(model, CapturedModule) and not isinstance(model, AdaptedModule):
        raise folded_already()
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
        return export_batch.write_batch(graph, reference, sources, bound, options, said)
    keys, loose = options.chosen(found, bound)
    graph, _, said = base_of(reference, keys, options)
    said += whole
    at_level(graph.model, options.accuracy_level)
    return export_switch.write_switch(
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
    model, said = translated(reference.base, options)
    graph = OnnxGraph(model)
    apart, keys_of = _by_keys(_lost(reference, graph, keys, single=options.mode == "batch"))
    if apart:
        graph = OnnxGraph(translated(reference.base, options, apart=apart)[0])
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
