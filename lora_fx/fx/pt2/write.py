"""The writing of a .pt2 archive: several programs over one set of weights, without pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.pt2_archive import PT2ArchiveWriter

from lora_fx.errors import LoraFxError, retold, type_of
from lora_fx.files.program_manifest import MANIFEST
from lora_fx.fx.capture.call import leaves_of
from lora_fx.fx.capture.cleaned_graph import Traced
from lora_fx.fx.capture.guards import GuardLog
from lora_fx.fx.capture.root_module import RootModule
from lora_fx.fx.capture.size_nodes import drop_layout, put_asserts
from lora_fx.fx.capture.trace import at_least_two, export_program
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.onnx_export.flat_graph import flat_program
from lora_fx.fx.pt2.factor_inputs import (
    EXAMPLE_RANK,
    argument_names,
    inserted_names,
    put_inputs,
    put_whole_inputs,
)
from lora_fx.fx.pt2.file_manifest import make_manifest
from lora_fx.fx.pt2.output_trees import plain_spec
from lora_fx.fx.pt2.program import tensor_places
from lora_fx.fx.pt2.serialised import bytes_of, json_of, table_of
from lora_fx.inputs import Named
from lora_fx.onnx.manifest import Manifest
from lora_fx.text import Json

Paths = Sequence[tuple[Named, Traced]]
"""The paths of a mode, each with a call that takes this path; the example's path comes first."""
Dims = Mapping[int, object] | None
"""The dynamic dimensions of a tensor, as torch.export takes them."""
NAMES = {False: "model", True: "train"}
ENTRY = f"{RootModule.__module__}.{RootModule.__qualname__}"
"""The class that torch records as a graph's root; files name the user's class instead."""


def write_programs(module: CapturedModule, path: Path, modes: Mapping[bool, Paths]) -> None:
    """Write the programs of a module: one for each mode (training or not) and path."""
    traced_programs: dict[str, tuple[bool, Traced]] = {}
    exported_programs: dict[str, tuple[ExportedProgram, str]] = {}
    for training, paths in modes.items():
        for i, (named, traced) in enumerate(paths):
            name = NAMES[training]
            if i:
                name = f"{name}_{i}"
            traced_programs[name] = (training, traced)
            graph = module.graph(training, portable=True, named=named)
            exported_programs[name] = _export(module, graph, named, traced)
    manifest = make_manifest(module, traced_programs)
    _write(path, module, exported_programs, module.state_dict(keep_vars=True), manifest)


def write_switchable(module: CapturedModule, graph: FxGraph, path: Path, switch: Manifest) -> None:
    """Write the eval program of a module, with A and B of its branches as inputs.

    Args:
        module: The base.
        graph: Its eval graph, with a branch for each slot; edited.
        path: The file.
        switch: The slot of each key, whose names the inputs get, and what ranks they take.
    """
    captured = execution_of(module).captured
    named = captured.named
    traced = captured.traced(False, named, execution_of(module).base_dtype)
    put_inputs(graph.graph, switch.slots)
    put_whole_inputs(graph, switch.whole)
    program = _export(module, graph, named, traced, _factors(switch))

    tensors = dict(module.state_dict(keep_vars=True))
    for key, slot in switch.slots.items():
        for name_in_tree in inserted_names(key, slot):
            del tensors[name_in_tree]
    manifest = make_manifest(module, {NAMES[False]: (False, traced)}, switch)
    _write(path, module, {NAMES[False]: program}, tensors, manifest)


def _write(
    path: Path,
    module: CapturedModule,
    programs: Mapping[str, tuple[ExportedProgram, str]],
    tensors: Mapping[str, torch.Tensor],
    manifest: Json,
) -> None:
    """Write exported programs, each with its tree of outputs, over the tensors of a module."""
    with PT2ArchiveWriter(str(path)) as archive:
        store = _Store(archive)
        for name, (program, spec) in programs.items():
            weights = dict(program.state_dict)
            if name == NAMES[False]:
                # tensors that no graph reads, and second names of others, stand beside one program
                weights = {**tensors, **weights}
            store.table("weights", "weight_", name, weights)
            store.table("constants", "tensor_", name, program.constants)
            archive.write_bytes(f"models/{name}.json", _json(program, spec, module))
            archive.write_bytes(f"data/sample_inputs/{name}.pt", b"")
        archive.write_string(MANIFEST, json.dumps(manifest))


class _Store:
    """The raw bytes of tensors, with each storage written once for all programs."""

    def __init__(self, archive: PT2ArchiveWriter) -> None:
        self.archive = archive
        self.files: dict[tuple[str, int], str] = {}  # (kind, address of a storage) → member
        self.alive: list[torch.Tensor] = []  # addresses of freed storages are used again

    def table(
        self, kind: str, prefix: str, program: str, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Write new bytes, and the program's table of tensors."""
        files = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or type(tensor.data) is not torch.Tensor:
                raise LoraFxError(
                    f"{name!r} is {type_of(tensor)} and cannot be written as raw bytes",
                    "save a model of plain tensors",
                )
            files[name] = self._file(kind, prefix, tensor)
        config = json.dumps(table_of(tensors, files))
        self.archive.write_string(f"data/{kind}/{program}_{kind}_config.json", config)

    def _file(self, kind: str, prefix: str, tensor: torch.Tensor) -> str:
        """Return the member that holds a tensor's storage; write the member at the first call."""
        address = tensor.untyped_storage().data_ptr()
        if not address:  # each empty storage is one of its own
            address = -1 - len(self.files)
        key = (kind, address)
        if key not in self.files:
            number = sum(1 for other_kind, _ in self.files if other_kind == kind)
            self.files[key] = f"{prefix}{number}"
            self.alive.append(tensor)
            self.archive.write_bytes(f"data/{kind}/{self.files[key]}", bytes_of(tensor))
        return self.files[key]


def _factors(switch: Manifest) -> dict[str, tuple[torch.Tensor, Dims]]:
    """Return an example of every input of an adapter by name, each with its dynamic dimensions."""
    free_rank = Dim.AUTO
    example_rank = switch.rank or EXAMPLE_RANK
    if switch.largest_rank:
        free_rank = Dim.AUTO(max=switch.largest_rank)
        example_rank = min(example_rank, switch.largest_rank)
    factors: dict[str, tuple[torch.Tensor, Dims]] = {}
    for slot in switch.slots.values():
        dtype = getattr(torch, slot.dtype)
        for name, shape in slot.tensor_shapes(None).items():
            sizes = [example_rank if size is None else size for size in shape]
            dims = None
            if None in shape and not switch.rank:
                dims = {shape.index(None): free_rank}
            factors[name] = (torch.zeros(sizes, dtype=dtype), dims)
    for whole in switch.whole.values():
        example = torch.zeros(whole.shape, dtype=getattr(torch, whole.dtype))
        factors[whole.name] = (example, None)
    return factors


def _export(
    module: CapturedModule,
    graph: FxGraph,
    named: Named,
    traced: Traced,
    factors: Mapping[str, tuple[torch.Tensor, Dims]] | None = None,
) -> tuple[ExportedProgram, str]:
    """Export the program of one mode and path; return it with its plain tree of outputs.

    Args:
        module: The module that holds the tensors.
        graph: Its graph for the mode and path; edited.
        named: A call that takes the path.
        traced: What the graph was made from.
        factors: A and B that the graph takes after the call's tensors, which the program takes by
            keyword: an example of each, and its dynamic dimensions.
    """
    factors = factors or {}
    flat, names, _ = flat_program(module, graph.graph, traced)
    _keep_volatile(flat, module)
    conditions = traced.door.conditions
    free = traced.door.free(execution_of(module).captured.requested)
    shapes: list[Dims] = []
    for dimensions in free.values():
        shapes.append({dimension: Dim.AUTO for dimension in dimensions} or None)
    # of the call's own sizes, for FLOPs are counted at them
    examples = dict(leaves_of(execution_of(module).in_own_dtype(named)))
    tensors = []
    for name, dimensions in free.items():
        tensors.append(at_least_two(examples[name], dimensions).cpu())
    places_of_call = flat.graph.find_nodes(op="placeholder")[: len(free)]
    arguments = argument_names(names)
    for place, argument in zip(places_of_call, arguments, strict=True):
        place.target = argument  # the program's inputs get the names of its parameters
    places = dict(zip(free, places_of_call, strict=True))
    put_asserts(flat.graph, places, conditions)
    flat.recompile()

    examples_of_factors = {name: example for name, (example, _) in factors.items()}
    shapes += [dims for _, dims in factors.values()]
    log = GuardLog()
    mode = "train" if graph.training else "eval"
    what = f"the {mode} program cannot be exported"
    with retold(what, "please report this model"), log.listening():
        program = export_program(flat, tuple(tensors), tuple(shapes), examples_of_factors)
    places_of_program = tensor_places(program)[: len(free)]
    sizes = {name: place.shape for name, place in zip(free, places_of_program, strict=True)}
    drop_layout(program.graph, log, sizes, conditions)
    program._example_inputs = None  # they would be a pickle
    call = program.module_call_graph[0].signature
    assert call is not None
    call.forward_arg_names = [*arguments, *factors]
    return program, json.dumps([1, plain_spec(traced.out_spec)])


def _keep_volatile(flat: nn.Module, module: nn.Module) -> None:
    """Keep buffers out of state_dict if they were; a GraphModule forgets this."""
    originals = dict(module.named_modules())
    for path, submodule in flat.named_modules():
        volatile = getattr(originals.get(path), "_non_persistent_buffers_set", ())
        submodule._non_persistent_buffers_set |= set(volatile) & set(submodule._buffers)


def _json(program: ExportedProgram, spec: str, module: CapturedModule) -> bytes:
    """Return models/NAME.json with the module's outputs and without this machine's paths."""
    class_name = type(module).__name__

    def strip(row: Json) -> Json:
        metadata = row.get("metadata")
        if isinstance(metadata, dict):
            row["metadata"] = _portable_metadata(metadata, class_name)
        return row

    data = json.loads(json_of(program), object_hook=strip)
    graph_module = data["graph_module"]
    graph_module["module_call_graph"] = graph_module["module_call_graph"][:1]
    graph_module["module_call_graph"][0]["signature"]["out_spec"] = spec
    data["guards_code"] = []
    return json.dumps(data).encode()


def _portable_metadata(metadata: Json, class_name: str) -> Json:
    """Return the modules behind a node, with the user's class as root, and our branch mark."""
    portable = {}
    stack = (metadata.get("nn_module_stack") or "").replace(ENTRY, class_name)
    if stack:
        portable["nn_module_stack"] = stack
    custom = metadata.get("custom")
    if custom:
        portable["custom"] = custom
    return portable
