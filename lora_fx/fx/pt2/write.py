"""Writing a .pt2 archive: several programs over one set of weights, and no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.pt2_archive import PT2ArchiveWriter

from lora_fx.errors import LoraFxError, retold
from lora_fx.fx.capture.call import leaves_of
from lora_fx.fx.capture.cleaned_graph import Traced
from lora_fx.fx.capture.guards import GuardLog
from lora_fx.fx.capture.root_module import RootModule
from lora_fx.fx.capture.size_nodes import drop_layout, put_asserts
from lora_fx.fx.capture.trace import at_least_two, export_program
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.onnx_export.flat_graph import flat_program
from lora_fx.fx.pt2.archive import MANIFEST
from lora_fx.fx.pt2.file_manifest import make_manifest
from lora_fx.fx.pt2.output_trees import plain_spec
from lora_fx.fx.pt2.program import tensor_places
from lora_fx.fx.pt2.serialised import bytes_of, json_of, table_of
from lora_fx.inputs import Named
from lora_fx.text import Json

Paths = Sequence[tuple[Named, Traced]]
"""The paths of the model's code in a mode, each with a call that takes it; the example's first."""
NAMES = {False: "model", True: "train"}
ENTRY = f"{RootModule.__module__}.{RootModule.__qualname__}"
"""The class that torch records for a graph's root; files name the user's own class instead."""


def write_programs(module: CapturedModule, path: Path, modes: Mapping[bool, Paths]) -> None:
    """Write the programs of a module: for each mode (training or not) one for each path."""
    traced_programs: dict[str, tuple[bool, Traced]] = {}
    exported_programs: dict[str, tuple[ExportedProgram, str]] = {}
    for training, paths in modes.items():
        for i, (named, traced) in enumerate(paths):
            name = NAMES[training]
            if i:
                name = f"{name}_{i}"
            traced_programs[name] = (training, traced)
            exported_programs[name] = _export(module, training, named, traced)
    manifest = make_manifest(module, traced_programs)
    all_tensors = module.state_dict(keep_vars=True)
    with PT2ArchiveWriter(str(path)) as archive:
        store = _Store(archive)
        for name, (program, spec) in exported_programs.items():
            weights = dict(program.state_dict)
            if name == NAMES[False]:
                # tensors that no graph reads, and second names of others, stand beside one program
                weights = {**all_tensors, **weights}
            store.table("weights", "weight_", name, weights)
            store.table("constants", "tensor_", name, program.constants)
            archive.write_bytes(f"models/{name}.json", _json(program, spec, module))
            archive.write_bytes(f"data/sample_inputs/{name}.pt", b"")
        archive.write_string(MANIFEST, json.dumps(manifest))


class _Store:
    """Raw bytes of tensors, each storage once for all programs."""

    def __init__(self, archive: PT2ArchiveWriter) -> None:
        self.archive = archive
        self.files: dict[tuple[str, int], str] = {}  # (kind, address of a storage) → member
        self.alive: list[torch.Tensor] = []  # addresses of freed storages are used again

    def table(
        self, kind: str, prefix: str, program: str, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Write the bytes that are new, and the program's table of names."""
        files = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or type(tensor.data) is not torch.Tensor:
                raise LoraFxError(
                    f"{name!r} is a {type(tensor).__name__} and cannot be written as raw bytes",
                    "save a model of plain tensors",
                )
            files[name] = self._file(kind, prefix, tensor)
        config = json.dumps(table_of(tensors, files))
        self.archive.write_string(f"data/{kind}/{program}_{kind}_config.json", config)

    def _file(self, kind: str, prefix: str, tensor: torch.Tensor) -> str:
        """The member that holds the bytes of a tensor's storage; written on first sight."""
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


def _export(
    module: CapturedModule, training: bool, named: Named, traced: Traced
) -> tuple[ExportedProgram, str]:
    """The program of one mode and path, and its plain tree of outputs."""
    graph = module.graph(training, portable=True, named=named)
    flat, names, _ = flat_program(module, graph.graph, traced)
    _keep_volatile(flat, module)
    conditions = traced.door.conditions
    free = traced.door.free(execution_of(module).captured.requested)
    shapes = []
    for dimensions in free.values():
        shapes.append({dimension: Dim.AUTO for dimension in dimensions} or None)
    # of the call's own sizes, for FLOPs are counted at them
    examples = dict(leaves_of(execution_of(module).in_own_dtype(named)))
    tensors = []
    for name, dimensions in free.items():
        tensors.append(at_least_two(examples[name], dimensions).cpu())
    places = dict(zip(free, flat.graph.find_nodes(op="placeholder"), strict=True))
    put_asserts(flat.graph, places, conditions)
    flat.recompile()

    log = GuardLog()
    mode = "train" if training else "eval"
    what = f"the {mode} program cannot be exported"
    with retold(what, "please report this model"), log.listening():
        program = export_program(flat, tuple(tensors), tuple(shapes))
    sizes = {name: place.shape for name, place in zip(free, tensor_places(program), strict=True)}
    drop_layout(program.graph, log, sizes, conditions)
    program._example_inputs = None  # they would be a pickle
    call = program.module_call_graph[0].signature
    assert call is not None
    call.forward_arg_names = list(names)
    return program, json.dumps([1, plain_spec(traced.out_spec)])


def _keep_volatile(flat: nn.Module, module: nn.Module) -> None:
    """Buffers that state_dict leaves out stay such; a GraphModule forgets it."""
    originals = dict(module.named_modules())
    for path, submodule in flat.named_modules():
        volatile = getattr(originals.get(path), "_non_persistent_buffers_set", ())
        submodule._non_persistent_buffers_set |= set(volatile) & set(submodule._buffers)


def _json(program: ExportedProgram, spec: str, module: CapturedModule) -> bytes:
    """models/NAME.json: with the module's outputs, without paths of this machine."""
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
    """The modules that made a node, the root under its own class's name, and our mark."""
    portable = {}
    stack = (metadata.get("nn_module_stack") or "").replace(ENTRY, class_name)
    if stack:
        portable["nn_module_stack"] = stack
    custom = metadata.get("custom")
    if custom:
        portable["custom"] = custom
    return portable
