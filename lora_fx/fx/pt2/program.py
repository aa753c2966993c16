"""The programs of a .pt2 file: deserialised from checked JSON, their call, and the manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram

from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.graph.nodes import hint, value
from lora_fx.fx.pt2.archive import Archive
from lora_fx.fx.pt2.program_gate import clean_program
from lora_fx.fx.pt2.serialised import program_of_json
from lora_fx.fx.trees import tree_unflatten
from lora_fx.text import Json, JsonView


@dataclass(frozen=True)
class LoadedProgram:
    """A program and its tensors.

    Attributes:
        program: What torch made of the JSON.
        state: Parameters and buffers by name, those that state_dict leaves out included.
        named: {argument: example value}: tensors of the example's sizes, and constants.
    """

    program: ExportedProgram
    state: Mapping[str, torch.Tensor]
    named: JsonView


def load_program(archive: Archive, name: str) -> LoadedProgram:
    """Read one program of an open archive.

    Raises:
        LoraFxError: Anything in it that is not allowed, damaged, or of another torch.
    """
    member = f"models/{name}.json"
    data = clean_program(archive.json(member), f"{archive.path}: {member}")
    weights = archive.state("data/weights/", name, "weights")
    constants = archive.state("data/constants/", name, "constants")
    try:
        program = program_of_json(data, weights, constants)
        signature = program.graph_signature
        state = dict(weights)
        for constant, tensor in constants.items():
            if constant in signature.non_persistent_buffers:
                state[constant] = tensor
        outputs = len(signature.user_outputs)
        leaves = program.call_spec.out_spec.num_leaves
        if leaves != outputs:
            raise archive.bad(f"{member} has {outputs} outputs, but a tree of {leaves} outputs")
        named = _example(program, data)
    except LoraFxError:
        raise
    except Exception as e:  # torch raises whatever its parsers do
        lines = str(e).strip().splitlines() or [""]
        raise LoraFxError(
            f"{archive.path}: {member} cannot be read by torch {torch.__version__}: "
            f"{one_line(f'{type(e).__name__}: {lines[-1]}', 200)}",
            "write the file again with this torch: torch.export.save",
        ) from e
    return LoadedProgram(program, state, named)


def _example(program: ExportedProgram, data: JsonView) -> Json:
    """Arguments by name: tensors as the program's own example was sized, constants as they are."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    leaves = []
    for row in program.graph_signature.input_specs:
        if row.kind.name != "USER_INPUT":
            continue
        if hasattr(row.arg, "value"):
            leaf = row.arg.value
        else:
            leaf = value(placeholders.get(row.arg.name))
        if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise LoraFxError(
                f"the argument {row.arg.name!r} is a number that is not constant",
                "export with numbers as constants or as tensors",
            )
        if isinstance(leaf, torch.Tensor):
            leaf = example_of(leaf)
        leaves.append(leaf)

    args, kwargs = tree_unflatten(leaves, program.call_spec.in_spec)
    call = data["graph_module"]["module_call_graph"][0]["signature"]
    names = list(call.get("forward_arg_names") or ())
    if len(names) < len(args):
        names = [f"arg{i}" for i in range(len(args))]
    by_position = dict(zip(names, args, strict=False))
    return {**by_position, **kwargs}


def example_of(place: torch.Tensor) -> torch.Tensor:
    """A tensor as large as the program's example: noise, or 0, 1, 0, 1 … of whole numbers."""
    shape = [hint(size) for size in place.shape]
    if place.dtype.is_floating_point or place.dtype.is_complex:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(place.dtype)
    alternating = torch.arange(math.prod(shape)) % 2
    return alternating.reshape(shape).to(place.dtype)


def tensor_places(program: ExportedProgram) -> list[torch.Tensor]:
    """The fake tensors of a program's tensor inputs, in order."""
    input_names = set()
    for row in program.graph_signature.input_specs:
        if row.kind.name == "USER_INPUT":
            input_names.add(row.arg.name)
    places = []
    for node in program.graph.nodes:
        place = node.meta.get("val")
        if node.name in input_names and isinstance(place, torch.Tensor):
            places.append(place)
    return places
