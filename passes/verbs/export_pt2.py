"""The .pt2 file of mode switch: one program that takes A and B of every target as inputs.

Whatever runs an ExportedProgram, or compiles one, can run it with every adapter: the adapters lie
beside it, each as a safetensors file with a tensor for each input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.adapter.evaluated import Evaluation, hashes_of_gains
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import replacing
from lora_fx.files.side_outputs import Beside
from lora_fx.fx.adapter_with_base import with_base
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.largest import with_largest
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.doubts import plain
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.module.module_base import said_of_other_bases
from lora_fx.fx.pt2.factor_inputs import input_slots, whole_inputs
from lora_fx.fx.pt2.write import write_switchable
from lora_fx.fx.weight_precision import precision_of
from lora_fx.inputs import SIZES
from lora_fx.ir.graph import Role
from lora_fx.onnx.manifest import Manifest
from lora_fx.passes.find import find as find_in
from lora_fx.passes.proofs.probe_making import Subject
from lora_fx.passes.proofs.reference import Run
from lora_fx.passes.proofs.switchable import prove_switchable
from lora_fx.passes.proofs.switchable_program import SwitchableProgram
from lora_fx.passes.proofs.torch_reference import TorchReference
from lora_fx.passes.switch import insert_switchable
from lora_fx.passes.verbs.adapt import find
from lora_fx.passes.verbs.export_files import (
    adapter_paths,
    adapters_of,
    refuse_unexchangeable,
    report_of,
    said_of_large_tensors,
    write_adapters,
)
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.export_probe import probe_file
from lora_fx.passes.verbs.export_slots import metadata_of, replaced_tensors, torch_reference
from lora_fx.passes.verbs.export_torch import folded_already
from lora_fx.passes.verbs.open import captured_of, opened, own_adapters
from lora_fx.passes.verbs.program import load_by_torch, share_memory
from lora_fx.probe.in_program import add_to_program
from lora_fx.progress import stage
from lora_fx.targets.found import Found
from lora_fx.targets.target import Target
from lora_fx.text import Json


def export_pt2(model: object, options: ExportOptions) -> Report:
    """Export a torch model as a .pt2 file of mode switch; see lora_fx.passes.verbs.export.

    Raises:
        LoraFxError: A target that the program has not; nothing is written.
        NoEffectError: The outputs differ, or a target changes nothing.
    """
    model = opened(model)
    if isinstance(model, CapturedModule) and not isinstance(model, AdaptedModule):
        raise folded_already()
    options = replace(options, adapters=own_adapters(model, options.adapters))
    captured, adapters, notes = _base_and_adapters(model, options)
    found = find(captured)
    keys, is_default_plan = options.chosen(found, adapters)
    reference = torch_reference(captured, options)
    base = plain(captured).eval()
    graph = base.graph(False, portable=True)
    holds_tensors = any(adapter.full for adapter in adapters.values())
    targets, left_out = _targets(graph, keys, loose=is_default_plan, may_be_empty=holds_tensors)
    warnings = [*map(str, captured.pinned), *notes, *left_out]

    rank = options.rank or 0
    largest_rank = (options.largest or {}).get("rank", 0)
    evaluation = Evaluation(reference.weight)
    served = {name: evaluation(adapter) for name, adapter in adapters.items()}
    refuse_unexchangeable(served, "a switchable file")
    gains = hashes_of_gains(served, evaluation, targets if options.takes_dora else ())
    slots = input_slots(targets, rank, reference.inputs.names, gains)
    whole = replaced_tensors(adapters)
    manifest = Manifest(slots, required=True, rank=rank, largest_rank=largest_rank)
    if whole:
        whole = whole_inputs(graph, whole, [*reference.inputs.names, *manifest.names()])
        values = {slot.name: slot.stored(graph.read(key)) for key, slot in whole.items()}
        manifest = replace(manifest, whole=whole, base=values)
    for name, adapter in served.items():
        manifest.tensors(adapter, f"adapter {name!r}")  # refused before the program is written
    paths = adapter_paths(adapters, options)
    insert_switchable(graph, [*targets.values()], Role.FROZEN, gains=gains)
    layouts = {key: found[key].layout for key in targets}
    beside = Beside()
    with replacing(options.target, force=options.force, parts=beside) as temporary:
        with stage("writing the program"):
            write_switchable(base, graph, temporary, manifest)
        program = load_by_torch(temporary)
        share_memory(program, base, "the file that torch loads")
        most = rank or largest_rank
        example = execution_of(base).in_own_dtype()
        file = SwitchableProgram(manifest, example, program, most, evaluation)
        parity = prove_switchable(file, reference, layouts, adapters, warnings, gains)
        write_adapters(paths, served, manifest, options, beside)
        subject = _subject(file, reference, adapters, found, options)
        of_probe = probe_file(temporary, subject, options.probe, "torch", warnings, add_to_program)

    details: Json = {"mode": "switch", "targets": len(slots), **reference.details(), **of_probe}
    if whole:
        details["whole_tensors"] = [*whole]
    files = [options.target, *paths.values()]
    return report_of(files, "torch", parity, warnings, details)


def _refuse_dimension_called_rank(captured: Captured) -> None:
    """Raise where `rank` among the largest sizes could be that of a dimension too."""
    for symbols in captured.traced(False, captured.named).door.free(captured.requested).values():
        if "rank" in symbols.values():
            raise LoraFxError(
                "the largest 'rank' is that of A and B, and a dimension has this name too",
                "give the dimension another name with --dynamic",
            )


def _base_and_adapters(
    model: object, options: ExportOptions
) -> tuple[Captured, dict[str, Adapter], list[str]]:
    """Return the capture of the base, the adapters, bound to it, and what has to be said.

    The base has the largest sizes that are asked for.
    """
    adapters = adapters_of(options)
    captured = captured_of(model, options.capture_of_base())
    largest = dict(options.largest or {})
    if largest.pop("rank", 0):
        _refuse_dimension_called_rank(captured)
    captured = with_largest(captured, largest)
    found = find(captured)
    bound = {
        name: bind(with_base(adapter, captured.model), found) for name, adapter in adapters.items()
    }
    notes = said_of_other_bases(metadata_of(bound), captured.model)
    notes += said_of_large_tensors(bound)
    for name, adapter in bound.items():
        if adapter.invocation:
            raise LoraFxError(
                f"{name} is an aLoRA, and a .pt2 file of mode switch has no input that says from "
                "which token on an adapter acts",
                "write an .onnx file; or write the adapted module itself with save_program",
            )
    return captured, bound, notes


def _targets(
    graph: FxGraph, keys: Sequence[str], *, loose: bool, may_be_empty: bool
) -> tuple[dict[str, Target], list[str]]:
    """Return the graph's target of each key, and a line for each key that is left out.

    Raises:
        LoraFxError: A key that the graph has no target for, unless `loose`; no target at all.
    """
    in_graph = find_in(graph)
    targets: dict[str, Target] = {}
    left_out: list[str] = []
    for key in keys:
        target = in_graph.get(key)
        if target is not None:
            targets[key] = target
        elif loose:
            left_out.append(f"{key}: left out, the exported graph has no such target")
        else:
            raise LoraFxError(
                f"{key!r} is not a target of the exported graph", "leave it out with --exclude"
            )
    if not targets and not may_be_empty:
        raise LoraFxError(
            "the model has no target that can be switched",
            "run lora-fx targets MODEL to list the targets",
        )
    return targets, left_out


def _subject(
    file: SwitchableProgram,
    reference: TorchReference,
    adapters: Mapping[str, Adapter],
    found: Found,
    options: ExportOptions,
) -> Subject:
    """Return a proven file as a probe is made of it."""
    runs = reference.varied()

    def of_file(name: str) -> Run:
        return file.run_with(adapters.get(name))

    return Subject(
        mode="switch",
        run=of_file,
        reference=runs.run,
        vary=file.run_with,
        is_slow=True,
        adapters=adapters,
        found=found,
        base=reference.base_facts(),
        feeds=partial(reference.feeds, SIZES[0]),
        base_file=options.base_file,
        files={name: f"{name}{options.adapter_ending}" for name in adapters},
        precision=precision_of(reference.captured),
        narrow=runs.narrow,
    )
