"""The programs of a .pt2 file: deserialised from checked JSON, their call, and the manifest."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import from_json, to_json
from lora_fx.adapter.variant import (
    bare,
    expect_variant,
    fields_of_files,
    slots_of,
    with_values,
)
from lora_fx.errors import LoraFxError, one_line, stamp
from lora_fx.fx.capture.cleaned_graph import Traced
from lora_fx.fx.graph.nodes import argument, hint, is_marked, scope_of, scopes_of, unmark, value
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import CapturedModule, scope_class
from lora_fx.fx.operators import OpOverload
from lora_fx.fx.pt2.archive import LEAF, Archive, clean_program, named_children
from lora_fx.fx.pt2.serialised import program_of_json
from lora_fx.fx.tensors import named_tensors, owner, to_numpy
from lora_fx.fx.trees import tree_unflatten
from lora_fx.text import Json, JsonView, by_key


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
        volatile = signature.non_persistent_buffers
        state = {**weights, **{n: t for n, t in constants.items() if n in volatile}}
        outputs, spec = len(signature.user_outputs), program.call_spec.out_spec
        if spec.num_leaves != outputs:
            raise archive.bad(f"{member} has {outputs} outputs and a tree of {spec.num_leaves}")
        named = _example(program, data)
    except LoraFxError:
        raise
    except Exception as e:  # torch raises whatever its parsers do
        last = (str(e).strip().splitlines() or [""])[-1]
        raise LoraFxError(
            f"{archive.path}: {member} cannot be read by torch {torch.__version__}: "
            f"{one_line(f'{type(e).__name__}: {last}', 200)}",
            "a file of another torch may have to be written again: torch.export.save",
        ) from e
    return LoadedProgram(program, state, named)


def _example(program: ExportedProgram, data: JsonView) -> Json:
    """Arguments by name: tensors as the program's own example was sized, constants as they are."""
    call = data["graph_module"]["module_call_graph"][0]["signature"]
    spec = program.call_spec.in_spec
    places = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    leaves = []
    for row in program.graph_signature.input_specs:
        if row.kind.name != "USER_INPUT":
            continue
        arg = row.arg
        found = arg.value if hasattr(arg, "value") else value(places.get(arg.name))
        if isinstance(found, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise LoraFxError(
                f"the argument {arg.name!r} is a number that varies",
                "export with numbers as constants, or as tensors",
            )
        leaves.append(example_of(found) if isinstance(found, torch.Tensor) else found)
    args, kwargs = tree_unflatten(leaves, spec)
    names = list(call.get("forward_arg_names") or ())
    if len(names) < len(args):
        names = [f"arg{i}" for i in range(len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def example_of(place: torch.Tensor) -> torch.Tensor:
    """A tensor as large as the program's example: noise, or 0, 1, 0, 1 … of whole numbers."""
    shape = [hint(n) for n in place.shape]
    if place.dtype.is_floating_point or place.dtype.is_complex:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(place.dtype)
    return (torch.arange(math.prod(shape)) % 2).reshape(shape).to(place.dtype)


def tree_of(programs: Sequence[LoadedProgram], skip: frozenset[str] = frozenset()) -> nn.Module:
    """The modules that hold the tensors of a file's programs, under their names.

    Args:
        programs: Their tensors are joined; one tensor under two names stays one.
        skip: Names to leave out (an adapter's).
    """
    # the first node that was made in a module says its class
    nodes = (n for loaded in reversed(programs) for n in reversed(loaded.program.graph.nodes))
    classes = {"": "Program", **{path: cls for n in nodes for path, cls in scopes_of(n).items()}}

    def scope(path: str) -> nn.Module:
        name = classes.get(path, "")
        made: nn.Module = scope_class(name if name.isidentifier() else "Scope")()
        return made

    root = scope("")
    for loaded in programs:
        volatile = loaded.program.graph_signature.non_persistent_buffers
        for name, t in loaded.state.items():
            if name in skip:
                continue
            module, leaf = owner(root, name, create=scope)
            if leaf in module._parameters or leaf in module._buffers:
                continue
            if isinstance(t, nn.Parameter):
                module.register_parameter(leaf, t)
            else:
                module.register_buffer(leaf, t, persistent=name not in volatile)
    for module in root.modules():
        digits = [n.isdigit() for n in module._modules]
        if type(module).__name__ == "Scope" and digits and all(digits):
            module.__class__ = scope_class("ModuleList")
    return root


# Small edits that turn a file's graph into one that passes know: its inputs, its branches.


aten = torch.ops.aten


def tensor_places(program: ExportedProgram) -> list[torch.Tensor]:
    """The fake tensors of a program's tensor inputs, in order."""
    names = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    values = [n.meta.get("val") for n in program.graph.nodes if n.name in names]
    return [v for v in values if isinstance(v, torch.Tensor)]


def strip_branches(graph: fx.Graph) -> None:
    """Take out what insert put in: a marked sum of a value and a branch is that value again."""
    for node in filter(is_marked, graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        y, branch = node.args[:2]
        if isinstance(y, fx.Node) and not is_marked(y) and is_marked(branch):
            node.replace_all_uses_with(y)
    for node in reversed(list(graph.nodes)):
        if is_marked(node):
            if not node.users:
                graph.erase_node(node)
            else:  # a view of the weight, now of the weight alone
                unmark(node)


# Which mode a graph was exported in: the operators that behave otherwise in training.


NORMS = ("batch_norm", "instance_norm")
FLAGS = ("train", "training", "use_input_stats")


@dataclass(frozen=True)
class Modal:
    """A node whose operator behaves otherwise in the other mode.

    Attributes:
        op: dropout, batch_norm …
        where: Path of the module that made it; may be empty.
        training: How it behaves here.
        norm: True for norms by running statistics, which can be frozen in training.
    """

    op: str
    where: str
    training: bool
    norm: bool = False


def modal_nodes(graph: fx.Graph) -> list[Modal]:
    """Every node of a graph that depends on the mode, dropout of probability 0 left out."""
    found = []
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or not isinstance(target, OpOverload):
            continue
        name = target._schema.name.partition("::")[2].rstrip("_")
        arguments = {a.name for a in target._schema.arguments}
        norm = any(n in name for n in NORMS)
        flag = next((f for f in FLAGS if f in arguments), None)
        attention = name == "scaled_dot_product_attention"
        if name == "bernoulli" or (attention and argument(node, "dropout_p")):
            found.append(Modal(name, scope_of(node)[0], True))
        elif name == "_native_batch_norm_legit_no_training":
            found.append(Modal("batch_norm", scope_of(node)[0], False, True))
        elif flag is not None and not _idle(node, arguments, norm):
            found.append(Modal(name, scope_of(node)[0], bool(argument(node, flag)), norm))
    return found


def _idle(node: fx.Node, arguments: Iterable[str], norm: bool) -> bool:
    """A dropout that drops nothing, or a norm without running statistics."""
    if norm:
        return argument(node, "running_mean") is None
    chance = next((n for n in ("p", "dropout") if n in arguments), None)
    return chance is not None and not argument(node, chance)


def mode_of(graph: fx.Graph) -> bool | None:
    """True for a train graph, False for an eval graph, None where both modes agree."""
    modes = [m.training for m in modal_nodes(graph)]
    return any(modes) if modes else None


def pick_programs(modes: Mapping[str, bool | None]) -> dict[bool, str]:
    """{training: name of the program for it}, from the modes of a file's programs.

    A program that is the same in both modes serves both. "model", then a name that says the
    mode, goes first where several fit.
    """
    result = {}
    for training in (False, True):
        said = ("train", "training") if training else ("model", "eval")
        fit = [n for n, mode in modes.items() if mode in (training, None)]
        rank = {n: said.index(n) if n in said else len(said) for n in fit}
        if fit:
            result[training] = min(fit, key=lambda n: (modes[n] is None, rank[n]))
    return result


def says(modals: Iterable[Modal]) -> str:
    """The operators by name and place, once each, for a message."""
    parts = []
    for op, places in by_key((m.op, m.where) for m in modals).items():
        first = next((p for p in places if p), "")
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        parts.append(f"{op}{f' of {first}' if first else ''}{more}")
    return ", ".join(parts)


# The manifest of our own .pt2 files: the call, the programs and the adapter, as JSON.


FORMAT = 2
"""That of a file with several programs of one mode, of which sizes choose; others have 1."""


def make_manifest(module: CapturedModule, programs: Mapping[str, tuple[bool, Traced]]) -> Json:
    """What a reader needs beside the programs.

    Args:
        module: What is saved.
        programs: {program name: (training, what it was made from)}.
    """
    modes = [training for training, _ in programs.values()]
    captured = execution_of(module).captured
    inputs = captured.bounded_inputs()
    return {
        **stamp(FORMAT if len(modes) > len({*modes}) else 1),
        "programs": {name: "train" if m else "eval" for name, (m, _) in programs.items()},
        "class": type(module).__name__,
        "parameters": [_parameter(p) for p in captured.signature.signature.parameters.values()],
        "arguments": _arguments(captured.named),
        "inputs": {
            s.name: {"dims": {str(d): n for d, n in s.dims.items()}, "high": s.high}
            for s in inputs.specs
        },
        "not_one": sorted([n, d] for n, d in execution_of(module).not_one),
        "conditions": {
            name: [c.stored() for c in traced.door.conditions]
            for name, (_, traced) in programs.items()
        },
        "norm_stats": execution_of(module).norm_stats,
        "recorded": captured.recorded,
        "adapter": _adapter(module) if isinstance(module, AdaptedModule) else None,
    }


def _adapter(module: AdaptedModule) -> Json:
    rows = {}
    for key, u in module.updates.items():
        rows[key] = {
            **{slot.field: slot.name for slot in slots_of(key, u)},
            **to_json(u, "frozen", "rank", "alpha", "scale", "variant", "use"),
            "role": insertion_of(module).found[key].role,
            **to_json(u, "layout", "extra"),
        }
    metadata = module.adapter().metadata
    aliases = named_tensors(module)[1]
    also_train = insertion_of(module).also_train
    tied = {name: aliases[name] for name in also_train if aliases.get(name)}
    whole = {"also_train": list(also_train), "tied": tied}
    return {"updates": rows, **whole, "metadata": _plain(metadata)}


def read_adapter(
    manifest: JsonView, state: Mapping[str, torch.Tensor], file: str
) -> Adapter | None:
    """The adapter of a file's manifest, its tensors taken from `state`; None without one.

    Raises:
        LoraFxError: An update of a variant that is not known here, or ranks that do not fit.
    """
    data = manifest.get("adapter")
    if data is None:
        return None
    entries: dict[str, LowRank | Full] = {}
    for key, row in data["updates"].items():
        expect_variant(str(row.get("variant", "lora")), f"{file}: the update of {key!r}")
        values = {f: _values(state, row[f]) for f in fields_of_files() if f in row}
        low = with_values(from_json(bare(values, row), row), values)
        entries[key] = low
        if low.rank != row["rank"]:
            raise LoraFxError(
                f"the manifest says rank {row['rank']} of {key!r}, its tensors {low.rank}",
                "the file is damaged",
            )
    tied = data.get("tied")
    for name in data["also_train"]:
        twins = tuple((tied or {}).get(name, ()))
        # older files say nothing, and mean all names of the tensor
        entries[name] = Full(_values(state, name), tied is None or bool(twins), twins)
    return Adapter(entries, dict(data["metadata"]))


def _values(state: Mapping[str, torch.Tensor], name: str) -> Any:
    t = state[name].detach()
    if t.device.type == "meta":
        t = torch.zeros(t.shape)
    return to_numpy(t.float() if t.is_floating_point() else t).copy()


def adapter_names(manifest: JsonView) -> frozenset[str]:
    """Names of the low-rank tensors in a file."""
    rows = (manifest.get("adapter") or {"updates": {}})["updates"].values()
    fields = fields_of_files()
    return frozenset(row[field] for row in rows for field in fields if field in row)


# --- the call ------------------------------------------------------------------------------------


def is_constant(value: object) -> bool:
    """True for arguments that a program has built in."""
    return value is None or isinstance(value, (bool, int, float, str))


def _parameter(p: inspect.Parameter) -> Json:
    row: Json = {"name": p.name, "kind": p.kind.name}
    if p.default is not inspect.Parameter.empty:
        row["default"] = p.default if is_constant(p.default) else None
    return row


def read_signature(rows: list[JsonView]) -> inspect.Signature:
    """The signature that `make_manifest` wrote."""
    empty, kinds = inspect.Parameter.empty, inspect._ParameterKind
    parameters = [
        inspect.Parameter(str(r["name"]), kinds[r["kind"]], default=r.get("default", empty))
        for r in rows
    ]
    return inspect.Signature(parameters)


def _arguments(value: object) -> object:
    """The tree of a call: tensors by {"tensor": true}, containers and constants as they are."""
    if isinstance(value, torch.Tensor):
        return {"tensor": True}
    if isinstance(value, dict):
        return {"dict": {str(k): _arguments(v) for k, v in value.items()}}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return {type(value).__name__: [_arguments(v) for v in value]}
    if is_constant(value):
        return {"constant": value}
    raise LoraFxError(
        f"an argument of type {type(value).__name__} cannot be written to a .pt2 file",
        "capture with tensors, numbers, tuples, lists and dicts",
    )


def read_arguments(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """The tree with example tensors in their places; takes them off `tensors`."""
    ((kind, inner),) = tree.items()
    if kind == "tensor":
        return tensors.pop(0)
    if kind == "dict":
        return {k: read_arguments(v, tensors) for k, v in inner.items()}
    if kind in ("tuple", "list"):
        parts = [read_arguments(v, tensors) for v in inner]
        return tuple(parts) if kind == "tuple" else parts
    return inner


def _plain(value: object) -> Any:
    """What JSON can hold of some metadata; the rest is left out."""
    if isinstance(value, Mapping):
        pairs = {str(k): _plain(v) for k, v in value.items()}
        return {k: v for k, v in pairs.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if is_constant(value) else None


def plain_spec(spec: Any) -> Json:
    """A tree of outputs as torch writes it, of dicts, lists and tuples only."""
    if spec.is_leaf():
        return LEAF
    children = [plain_spec(c) for c in spec.children()]
    names: Any = spec.context
    if isinstance(names, type) and hasattr(names, "_fields"):
        names = list(names._fields)
    found = None if spec.type in (tuple, list) else named_children(names, children)
    kind = f"builtins.{'list' if spec.type is list else 'tuple'}"
    return found or {"type": kind, "context": "null", "children_spec": children}
