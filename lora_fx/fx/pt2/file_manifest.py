"""The manifest in our own .pt2 files: the call, the programs and the adapter, as JSON."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.entry_json import from_json, to_json
from lora_fx.adapter.factor_tensors import slots_of, with_values
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.variant import bare, expect_variant, fields_of_files
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, stamp
from lora_fx.files.program_manifest import SWITCH
from lora_fx.fx.capture.cleaned_graph import Traced
from lora_fx.fx.dotted_names import named_tensors
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import to_numpy
from lora_fx.inputs import Input
from lora_fx.onnx.manifest import Manifest
from lora_fx.text import Json, JsonView

FORMAT = 2
"""The format of a file with several programs per mode, chosen by sizes."""
SWITCH_FORMAT = 3
"""The format of a file that takes A and B as inputs; a file with neither has 1."""
MODES = {False: "eval", True: "train"}
"""Whether a program is for training → the name of its mode in a manifest."""


def make_manifest(
    module: CapturedModule,
    programs: Mapping[str, tuple[bool, Traced]],
    switch: Manifest | None = None,
) -> Json:
    """Make the manifest: everything that a reader needs in addition to the programs.

    Args:
        module: What is saved.
        programs: {program name: (training, what it was made from)}.
        switch: The inputs that take A and B, where the programs have any.
    """
    training_modes = [training for training, _ in programs.values()]
    has_paths = len(training_modes) > len(set(training_modes))
    execution = execution_of(module)
    captured = execution.captured
    inputs = captured.bounded_inputs()
    adapter = None
    if isinstance(module, AdaptedModule):
        adapter = _adapter_rows(module)
    format_number = FORMAT if has_paths else 1
    if switch is not None:
        format_number = SWITCH_FORMAT
    return {
        **stamp(format_number),
        "programs": {name: MODES[training] for name, (training, _) in programs.items()},
        "class": type(module).__name__,
        "parameters": [
            _parameter_row(parameter)
            for parameter in captured.signature.signature.parameters.values()
        ],
        "arguments": _argument_tree(captured.named),
        "inputs": {spec.name: _input_row(spec) for spec in inputs.specs},
        "not_one": sorted([name, dimension] for name, dimension in execution.not_one),
        "conditions": {
            name: [condition.stored() for condition in traced.door.conditions]
            for name, (_, traced) in programs.items()
        },
        "norm_stats": execution.norm_stats,
        "recorded": captured.recorded,
        "adapter": adapter,
        **({} if switch is None else {SWITCH: json.loads(switch.to_text())}),
    }


def _input_row(spec: Input) -> Json:
    """Return the free dimensions of an input, and the limit of its values."""
    symbols = {str(dimension): symbol for dimension, symbol in spec.dims.items()}
    return {"dims": symbols, "high": spec.high}


def _adapter_rows(module: AdaptedModule) -> Json:
    """Return the updates of a module's adapter by key, and the tensors that are trained whole."""
    targets = insertion_of(module).found
    updates = {}
    for key, update in module.updates.items():
        updates[key] = {
            **{slot.field: slot.name for slot in slots_of(key, update)},
            **to_json(update, "frozen", "rank", "alpha", "scale", "variant", "use"),
            "role": targets[key].role,
            **to_json(update, "layout", "extra"),
        }
    metadata = module.adapter().metadata
    also_train = list(insertion_of(module).also_train)
    _, aliases = named_tensors(module)
    tied = {name: aliases[name] for name in also_train if aliases.get(name)}
    return {
        "updates": updates,
        "also_train": also_train,
        "tied": tied,
        "metadata": _plain(metadata),
    }


def read_adapter(
    manifest: JsonView, state: Mapping[str, torch.Tensor], file: str
) -> Adapter | None:
    """Return the adapter of a manifest, with tensors from `state`; None without an adapter.

    Raises:
        LoraFxError: An update of a variant that is not known here, or ranks that do not fit.
    """
    data = manifest.get("adapter")
    if data is None:
        return None
    fields = fields_of_files()
    entries: dict[str, LowRank | Full] = {}
    for key, row in data["updates"].items():
        expect_variant(str(row.get("variant", "lora")), f"{file}: the update of {key!r}")
        values = {field: _array(state, row[field]) for field in fields if field in row}
        update = with_values(from_json(bare(values, row), row), values)
        if update.rank != row["rank"]:
            raise LoraFxError(
                f"the manifest gives {key!r} rank {row['rank']}, but its tensors have rank "
                f"{update.rank}",
                "the file is damaged",
            )
        entries[key] = update

    tied = data.get("tied")
    for name in data["also_train"]:
        twins = tuple((tied or {}).get(name, ()))
        # older files say nothing, and mean all names of the tensor
        entries[name] = Full(_array(state, name), tied is None or bool(twins), twins)
    return Adapter(entries, dict(data["metadata"]))


def _array(state: Mapping[str, torch.Tensor], name: str) -> Array:
    """Return a tensor's values, with floats as fp32; zeros for a tensor without values."""
    tensor = state[name].detach()
    if tensor.device.type == "meta":
        tensor = torch.zeros(tensor.shape)
    if tensor.is_floating_point():
        tensor = tensor.float()
    return to_numpy(tensor).copy()


def adapter_names(manifest: JsonView) -> frozenset[str]:
    """Return the names of the low-rank tensors in a file."""
    names: set[str] = set()
    fields = fields_of_files()
    adapter = manifest.get("adapter") or {"updates": {}}
    for row in adapter["updates"].values():
        names.update(row[field] for field in fields if field in row)
    return frozenset(names)


def is_constant(value: object) -> bool:
    """True for an argument that is built into a program as a constant."""
    return value is None or isinstance(value, (bool, int, float, str))


def _parameter_row(parameter: inspect.Parameter) -> Json:
    """Return a parameter as JSON; a default that is not a constant becomes None."""
    row: Json = {"name": parameter.name, "kind": parameter.kind.name}
    if is_constant(parameter.default):
        row["default"] = parameter.default
    elif parameter.default is not inspect.Parameter.empty:
        row["default"] = None
    return row


def read_signature(rows: list[JsonView]) -> inspect.Signature:
    """Read the signature that `make_manifest` wrote."""
    parameters = []
    for row in rows:
        kind = inspect._ParameterKind[row["kind"]]
        default = row.get("default", inspect.Parameter.empty)
        parameters.append(inspect.Parameter(str(row["name"]), kind, default=default))
    return inspect.Signature(parameters)


def _argument_tree(value: object) -> object:
    """Return the tree of a call: {"tensor": true} for tensors, containers, and constants."""
    if isinstance(value, torch.Tensor):
        return {"tensor": True}
    if isinstance(value, dict):
        return {"dict": {str(key): _argument_tree(inner) for key, inner in value.items()}}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return {type(value).__name__: [_argument_tree(inner) for inner in value]}
    if is_constant(value):
        return {"constant": value}
    raise LoraFxError(
        f"an argument of type {type(value).__name__} cannot be written to a .pt2 file",
        "capture with tensors, numbers, tuples, lists and dicts",
    )


def read_arguments(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """Return the tree with example tensors in their places; remove these from `tensors`."""
    ((kind, inner),) = tree.items()
    if kind == "tensor":
        return tensors.pop(0)
    if kind == "dict":
        return {key: read_arguments(value, tensors) for key, value in inner.items()}
    if kind == "tuple":
        return tuple(read_arguments(value, tensors) for value in inner)
    if kind == "list":
        return [read_arguments(value, tensors) for value in inner]
    return inner


def _plain(value: object) -> Any:
    """Return the part of some metadata that JSON can hold."""
    if isinstance(value, Mapping):
        fields = {}
        for key, inner in value.items():
            plain = _plain(inner)
            if plain is not None:
                fields[str(key)] = plain
        return fields
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if is_constant(value):
        return value
    return None
