"""One program of a .pt2 file: deserialised from checked JSON, its call described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._export.serde import schema
from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.graph.nodes import hint
from lora_fx.fx.module.skeleton import scope_class
from lora_fx.fx.pt2_check import clean_program
from lora_fx.fx.pt2_zip import Archive


@dataclass(frozen=True)
class Loaded:
    """A program and its tensors.

    Attributes:
        program: What torch made of the JSON.
        state: Parameters and buffers by name, those that state_dict leaves out included.
        volatile: Names of the buffers that state_dict leaves out.
        named: {argument: example value}: tensors of the example's sizes, and constants.
        classes: {module path: class name}, as far as nodes say.
    """

    program: ExportedProgram
    state: Mapping[str, torch.Tensor]
    volatile: frozenset[str]
    named: Mapping[str, Any]
    classes: Mapping[str, str]


def load_program(archive: Archive, name: str) -> Loaded:
    """Read one program of an open archive.

    Raises:
        LoraFxError: Anything in it that is not allowed, damaged, or of another torch.
    """
    member = f"models/{name}.json"
    data = clean_program(archive.json(member), f"{archive.path}: {member}")
    weights = archive.state("data/weights/", name, "weights")
    constants = archive.state("data/constants/", name, "constants")
    try:
        serialized = _dict_to_dataclass(schema.ExportedProgram, data)  # type: ignore[no-untyped-call]
        program = ExportedProgramDeserializer().deserialize(serialized, weights, constants)
        signature = program.graph_signature
        volatile = frozenset(signature.non_persistent_buffers)
        state = {**weights, **{n: constants[n] for n in constants if n in volatile}}
        outputs, spec = len(signature.user_outputs), program.call_spec.out_spec
        if spec.num_leaves != outputs:
            raise archive.bad(f"{member} has {outputs} outputs and a tree of {spec.num_leaves}")
        named = _example(program, data)
    except LoraFxError:
        raise
    except Exception as e:  # torch raises whatever its parsers do
        raise LoraFxError(
            f"{archive.path}: {member} cannot be read by torch {torch.__version__}: "
            f"{one_line(_last_line(e), 200)}",
            "a file of another torch may have to be written again: torch.export.save",
        ) from e
    return Loaded(program, state, volatile, named, _classes(program))


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def _example(program: ExportedProgram, data: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name: tensors as the program's own example was sized, constants as they are."""
    call = data["graph_module"]["module_call_graph"][0]["signature"]
    spec = program.call_spec.in_spec
    places = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    leaves = []
    for row in program.graph_signature.input_specs:
        if row.kind.name != "USER_INPUT":
            continue
        arg = row.arg
        value = getattr(arg, "value", None)
        if arg.name in places and not hasattr(arg, "value"):
            value = places[arg.name].meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise LoraFxError(
                f"the argument {arg.name!r} is a number that varies",
                "export with numbers as constants, or as tensors",
            )
        leaves.append(example_of(value) if isinstance(value, torch.Tensor) else value)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    names = list(call.get("forward_arg_names") or ())
    if len(names) < len(args):
        names = [f"arg{i}" for i in range(len(args))]
    named = dict(zip(names, args, strict=False))
    return {**named, **kwargs}


def example_of(value: torch.Tensor) -> torch.Tensor:
    """A tensor as large as the program's example: noise, or 0, 1, 0, 1 … of whole numbers."""
    shape = [hint(n) for n in value.shape]
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(value.dtype)
    count = int(torch.Size(shape).numel())
    return (torch.arange(count) % 2).reshape(shape).to(value.dtype)


def _classes(program: ExportedProgram) -> dict[str, str]:
    """{path: class name} from the module stacks of the nodes."""
    result: dict[str, str] = {}
    for node in program.graph.nodes:
        for path, cls in (node.meta.get("nn_module_stack") or {}).values():
            text = cls if isinstance(cls, str) else cls.__name__
            result.setdefault(str(path).partition("@")[0], text.rpartition(".")[2])
    return result


def tree_of(programs: Sequence[Loaded], skip: frozenset[str] = frozenset()) -> nn.Module:
    """The modules that hold the tensors of a file's programs, under their names.

    Args:
        programs: Their tensors are joined; one tensor under two names stays one.
        skip: Names to leave out (an adapter's).
    """
    classes = {k: v for p in reversed(programs) for k, v in p.classes.items()}
    root: nn.Module = scope_class(_identifier(classes.get("", "Program")))()
    for loaded in programs:
        for name, t in loaded.state.items():
            if name in skip:
                continue
            *path, leaf = _split(name)
            module, at = root, ""
            for part in path:
                at = f"{at}.{part}" if at else part
                if part not in module._modules:
                    module.add_module(part, scope_class(_identifier(classes.get(at, "")))())
                child = module._modules[part]
                assert child is not None
                module = child
            if leaf in module._parameters or leaf in module._buffers:
                continue
            if isinstance(t, nn.Parameter):
                module.register_parameter(leaf, t)
            else:
                module.register_buffer(leaf, t, persistent=name not in loaded.volatile)
    for module in root.modules():
        digits = [n.isdigit() for n in module._modules]
        if type(module).__name__ == "Scope" and digits and all(digits):
            module.__class__ = scope_class("ModuleList")
    return root


def _split(name: str) -> list[str]:
    """Parts of a dotted name; dots in a bracketed region do not count."""
    head, bracket, tail = name.partition("[")
    parts = head.split(".")
    return [*parts[:-1], parts[-1] + bracket + tail]


def _identifier(name: str) -> str:
    return name if name.isidentifier() else "Scope"
