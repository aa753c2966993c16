"""export of a torch model in modes switch, load and batch: export the base, then rewrite it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.compare import ORT_TOL, Report
from lora_fx.errors import LoraFxError
from lora_fx.fx.adapter_with_base import with_base
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.module.module_base import said_of_other_bases
from lora_fx.fx.quantised_parameters import forms
from lora_fx.ir.graph import Site
from lora_fx.onnx.batch_inputs import batch_symbol
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.manifest import WholeSlot
from lora_fx.onnx.precision import at_level
from lora_fx.passes.batch import StoredWeight
from lora_fx.passes.proofs.torch_reference import TorchReference
from lora_fx.passes.verbs.adapt import find, insert
from lora_fx.passes.verbs.export_batch import write_batch
from lora_fx.passes.verbs.export_files import adapters_of
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.export_switch import SwitchTargets, write_switch
from lora_fx.passes.verbs.export_torch import folded_already, level_gate, translated
from lora_fx.passes.verbs.open import captured_of, opened, own_adapters
from lora_fx.targets.keys import applies, base_name, own_use, split_region, split_use
from lora_fx.targets.target import Target
from lora_fx.text import JsonView, free_name


def export_slots(model: object, options: ExportOptions) -> Report:
    """Export in mode switch, load or batch; see lora_fx.passes.verbs.export."""
    model = opened(model)
    if isinstance(model, CapturedModule) and not isinstance(model, AdaptedModule):
        raise folded_already()
    options = replace(options, adapters=own_adapters(model, options.adapters))
    adapters = adapters_of(options)
    captured = captured_of(model, options.capture_of_base())
    targets = find(captured)
    bound = {
        name: bind(with_base(adapter, captured.model), targets)
        for name, adapter in adapters.items()
    }
    if options.mode == "batch":
        return _export_batch(captured, bound, options)

    notes_of_base = said_of_other_bases(metadata_of(bound), captured.model)
    reference = torch_reference(captured, options, level_gate(options))
    keys, loose = options.chosen(targets, bound)
    whole = replaced_tensors(bound)
    graph, _, notes = base_of(reference, keys, options, whole)
    notes += notes_of_base
    at_level(graph.model, options.accuracy_level)
    targets_of_model = SwitchTargets(keys, whole, loose=loose, captured=targets)
    return write_switch(graph, reference, targets_of_model, bound, options, notes)


def _export_batch(
    captured: Captured, adapters: Mapping[str, Adapter], options: ExportOptions
) -> Report:
    """Export the base so that each row of the batch can use another adapter."""
    reference = torch_reference(captured, options, level_gate(options))
    keys: dict[str, None] = {}
    for adapter in adapters.values():
        for key in adapter.lowrank:
            if split_use(key)[1]:
                # the weight of one use is stored apart, and whole
                key = split_region(key)[0]
            keys[key] = None
    whole = replaced_tensors(adapters)
    graph, keys_of, notes = base_of(reference, [*keys], options, whole)
    sources = _sources(reference.base, graph, keys_of)
    batch_symbol(graph.model, *_without_batch(captured))
    notes += said_of_other_bases(metadata_of(adapters), captured.model)
    return write_batch(graph, reference, sources, adapters, options, notes)


def metadata_of(adapters: Mapping[str, Adapter]) -> dict[str, JsonView]:
    """Return the metadata of each adapter by its name."""
    return {name: adapter.metadata for name, adapter in adapters.items()}


def replaced_tensors(adapters: Mapping[str, Adapter]) -> dict[str, WholeSlot]:
    """Return the tensors that adapters hold as a whole, by key; the file has them by that name.

    Raises:
        LoraFxError: One that another update changes in one of its uses alone.
    """
    whole: dict[str, WholeSlot] = {}
    for adapter in adapters.values():
        for key, full in adapter.full.items():
            whole[key] = WholeSlot(key, full.value.shape, aliases=full.twins)
    for name, adapter in adapters.items():
        for key in adapter.lowrank:
            if split_use(key)[1] and base_name(key) in whole:
                raise LoraFxError(
                    f"{name}: {key!r} changes one use of a tensor that another adapter replaces "
                    "in all of its uses",
                    "export one file for each of them",
                )
    return whole


def _without_batch(captured: Captured) -> tuple[str, str]:
    """Return why the inputs share no dynamic dimension 0, and the hint."""
    specs = [spec for spec in captured.inputs.specs if spec.shape]
    pinned = {pin.input: str(pin) for pin in captured.pinned if pin.dim == 0}
    fixed_by_user = [spec.name for spec in specs if 0 not in spec.dims and spec.name not in pinned]
    if fixed_by_user:
        names = ", ".join(fixed_by_user)
        return "", (
            f"leave dimension 0 of {names} dynamic: leave --static out, or pass --dynamic "
            "NAME:0=batch"
        )
    if pinned:
        return next(iter(pinned.values())), "use mode merged or switch"
    names = ", ".join(spec.name for spec in specs)
    return "", f"use one symbol for dimension 0 of {names}: pass --dynamic NAME:0=batch for each"


def torch_reference(
    captured: Captured, options: ExportOptions, tol: float = ORT_TOL
) -> TorchReference:
    """Return the reference that a file has to equal; branches of insert add the adapters."""

    def branched(adapter: Adapter) -> CapturedModule:
        return insert(captured, adapter=adapter, dead="allow")

    return TorchReference(captured, branched, options.inputs, tol)


def base_of(
    reference: TorchReference,
    keys: Sequence[str],
    options: ExportOptions,
    whole: Collection[str] = (),
) -> tuple[OnnxGraph, dict[str, tuple[str, ...]], list[str]]:
    """Export the base to ONNX, with a target for every key that can have one.

    In mode batch the weight of a key of one use is stored apart, whatever the file can tell.
    Tensors of `whole` are stored as they lie in the model.

    Returns:
        The base, the keys that reach each weight that is stored apart, and what has to be said.
    """
    model, notes = translated(reference.base, options, whole=whole)
    graph = OnnxGraph(model)
    lost = _lost_targets(reference, graph, keys, single=options.mode == "batch")
    stored_apart, keys_of = _by_keys(lost)
    if stored_apart:
        model, _ = translated(reference.base, options, apart=stored_apart, whole=whole)
        graph = OnnxGraph(model)
    pinned = map(str, execution_of(reference.base).captured.pinned)
    return graph, keys_of, [*pinned, *notes]


def _lost_targets(
    reference: TorchReference, graph: OnnxGraph, keys: Sequence[str], *, single: bool
) -> dict[str, Target]:
    """Return targets that the export lost: the graph computes their weight, or lacks their use.

    With `single`, targets of single uses are among them: the file does not name a use's module.
    """
    exported = find(graph)
    lost_keys = [key for key in keys if exported.get(key) is None or (single and split_use(key)[1])]
    if not lost_keys:
        return {}
    captured = find(reference.base.graph(False, portable=True))
    lost: dict[str, Target] = {}
    for key in lost_keys:
        target = captured.get(key)
        if target is None or target.other_readers or key.endswith("]"):
            continue
        sites = tuple(site for site in target.sites if applies(own_use(key), site))
        if sites:
            lost[key] = replace(target, sites=sites)
    return lost


def _by_keys(lost: Mapping[str, Target]) -> tuple[dict[str, Target], dict[str, tuple[str, ...]]]:
    """Group the lost uses by the keys that reach them; return a named copy for each group.

    Keys of several adapters may share uses: `w@head.weight` and `w@op:linear`.
    """
    sites_of: dict[tuple[str, ...], dict[str, Site]] = {}
    for target in lost.values():
        for site in target.sites:
            keys = tuple(key for key, other in lost.items() if site in other.sites)
            sites_of.setdefault(keys, {})[site.id] = site

    stored_apart: dict[str, Target] = {}
    keys_of: dict[str, tuple[str, ...]] = {}
    for keys, sites in sites_of.items():
        name = free_name(keys[0], stored_apart)
        stored_apart[name] = replace(lost[keys[0]], sites=tuple(sites.values()))
        keys_of[name] = keys
    return stored_apart, keys_of


def _sources(
    base: CapturedModule, graph: OnnxGraph, keys_of: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, StoredWeight]]:
    """Return the parameter and StoredWeight of each stored tensor."""
    torch_graph = base.graph(False)
    coded = forms(base)
    by_any_name = {}
    for torch_parameter in torch_graph.parameters():
        for name in torch_parameter.names:
            by_any_name[name] = torch_parameter

    result: dict[str, tuple[str, StoredWeight]] = {}
    for stored in graph.parameters():
        names_apart = keys_of.keys() & {*stored.names}
        if names_apart:
            name = names_apart.pop()
            result[stored.name] = (name, StoredWeight(stored.shape, keys=keys_of[name]))
            continue
        parameter = by_any_name.get(stored.name)
        if parameter is None or len(parameter.shape) < 2:
            continue
        if parameter.format:
            # rows of codes are [out, in], however the parameter lies
            transposed = coded[parameter.name].turned
        else:
            stored_value = graph.read(stored.name)
            value = torch_graph.read(parameter.name)
            transposed = not np.array_equal(stored_value, value)
            if transposed and not (value.ndim == 2 and np.array_equal(stored_value, value.T)):
                continue
        result[stored.name] = (parameter.name, StoredWeight(parameter.shape, turned=transposed))
    return result
