"""The manifest of our own .pt2 files: the call, the programs and the adapter, as JSON."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

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
from lora_fx.errors import LoraFxError, stamp
from lora_fx.fx.capture.cleaned_graph import Traced
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import named_tensors, to_numpy
from lora_fx.text import Json, JsonView

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
