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
from lora_fx.fx.pt2.archive import MANIFEST
from lora_fx.fx.pt2.program import make_manifest, plain_spec, tensor_places
from lora_fx.fx.pt2.serialised import bytes_of, json_of, table_of
from lora_fx.fx.to_onnx import flat_program
from lora_fx.inputs import Named
from lora_fx.text import Json

Paths = Sequence[tuple[Named, Traced]]
"""The paths of the model's code in a mode, each with a call that takes it; the example's first."""
NAMES = {False: "model", True: "train"}
ENTRY = f"{RootModule.__module__}.{RootModule.__qualname__}"
"""What torch records as the class of a graph's root; files name the user's own class."""


def write_programs(module: CapturedModule, path: Path, modes: Mapping[bool, Paths]) -> None:
    """Write the programs of a module: for each mode (training or not) those of its paths."""
    held: dict[str, tuple[bool, Traced]] = {}
    made = {}
    for training, found in modes.items():
        for i, (named, traced) in enumerate(found):
            name = f"{NAMES[training]}_{i}" if i else NAMES[training]
            held[name] = training, traced
            made[name] = _export(module, training, named, traced)
    manifest = make_manifest(module, held)
    kept = module.state_dict(keep_vars=True)
    with PT2ArchiveWriter(str(path)) as archive:
        store = _Store(archive)
        for name, (program, spec) in made.items():
            # tensors that no graph reads, and second names of others, stand beside one program
            more = kept if name == NAMES[False] else {}
            store.table("weights", "weight_", name, {**more, **program.state_dict})
            store.table("constants", "tensor_", name, program.constants)
            archive.write_bytes(f"models/{name}.json", _json(program, spec, module))
            archive.write_bytes(f"data/sample_inputs/{name}.pt", b"")
        archive.write_string(MANIFEST, json.dumps(manifest))


class _Store:
    """Raw bytes of tensors, each storage once for all programs."""

    def __init__(self, archive: PT2ArchiveWriter) -> None:
        self.archive = archive
        self.files: dict[tuple[str, int], str] = {}
        self.alive: list[torch.Tensor] = []

    def table(
        self, kind: str, prefix: str, program: str, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Write the bytes that are new, and the program's table of names."""
        files = {}
        for name, t in tensors.items():
            if not isinstance(t, torch.Tensor) or type(t.data) is not torch.Tensor:
                raise LoraFxError(
                    f"{name!r} is a {type(t).__name__} and cannot be written as raw bytes",
                    "save a model of plain tensors",
                )
            pointer = t.untyped_storage().data_ptr()
            key = (kind, pointer) if pointer else (kind, -1 - len(self.files))
            if key not in self.files:
                self.files[key] = f"{prefix}{len([k for k in self.files if k[0] == kind])}"
                self.alive.append(t)
                self.archive.write_bytes(f"data/{kind}/{self.files[key]}", bytes_of(t))
            files[name] = self.files[key]
        config = json.dumps(table_of(tensors, files))
        self.archive.write_string(f"data/{kind}/{program}_{kind}_config.json", config)


def _export(
    module: CapturedModule, training: bool, named: Named, traced: Traced
) -> tuple[ExportedProgram, str]:
    """The program of one mode and path, and its plain tree of outputs."""
    graph = module.graph(training, portable=True, named=named)
    flat, names, _ = flat_program(module, graph.graph, traced)
    _keep_volatile(flat, module)
    free = traced.door.free(execution_of(module).captured.requested)
    shapes = tuple({d: Dim.AUTO for d in dims} or None for dims in free.values())
    # of the call's own sizes, for FLOPs are counted at them
    examples = dict(leaves_of(execution_of(module).in_own_dtype(named)))
    tensors = tuple(at_least_two(examples[name], dims).cpu() for name, dims in free.items())
    places = dict(zip(free, flat.graph.find_nodes(op="placeholder"), strict=True))
    put_asserts(flat.graph, places, traced.door.conditions)
    flat.recompile()
    log = GuardLog()
    what = f"the {'train' if training else 'eval'} program cannot be exported"
    with retold(what, "please report this model"), log.listening():
        program = export_program(flat, tensors, shapes)
    sizes = {n: t.shape for n, t in zip(free, tensor_places(program), strict=True)}
    drop_layout(program.graph, log, sizes, traced.door.conditions)
    program._example_inputs = None  # they would be a pickle
    call = program.module_call_graph[0].signature
    assert call is not None
    call.forward_arg_names = list(names)
    return program, json.dumps([1, plain_spec(traced.out_spec)])


def _keep_volatile(flat: nn.Module, module: nn.Module) -> None:
    """Buffers that state_dict leaves out stay such; a GraphModule forgets it."""
    for path, part in flat.named_modules():
        own = dict(module.named_modules()).get(path)
        kept = getattr(own, "_non_persistent_buffers_set", ())
        part._non_persistent_buffers_set |= set(kept) & set(part._buffers)


def _json(program: ExportedProgram, spec: str, module: CapturedModule) -> bytes:
    """models/NAME.json: with the module's outputs, without paths of this machine."""

    def strip(row: Json) -> Json:
        if isinstance(told := row.get("metadata"), dict):
            stack = (told.get("nn_module_stack") or "").replace(ENTRY, type(module).__name__)
            kept = {"nn_module_stack": stack, "custom": told.get("custom")}
            row["metadata"] = {k: v for k, v in kept.items() if v}
        return row

    data = json.loads(json_of(program), object_hook=strip)
    whole = data["graph_module"]
    whole["module_call_graph"] = whole["module_call_graph"][:1]
    whole["module_call_graph"][0]["signature"]["out_spec"] = spec
    data["guards_code"] = []

    return json.dumps(data).encode()
