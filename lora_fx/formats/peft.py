"""Adapters as PEFT stores them: adapter_config.json beside adapter_model.safetensors.

ΔW of a module X is s · B · A with s = lora_alpha / r, or lora_alpha / √r with use_rslora; the rank
and alpha of single modules come from rank_pattern and alpha_pattern. Modules of modules_to_save
are stored whole under their own names. Checked against peft 0.21.2.

What PEFT cannot say (parts of a tensor, stacks, parameters that are no `.weight`) goes into the
same file under names that PEFT passes over, and is described, with the layouts of all updates,
by JSON under `lora_fx` in the header. Files without that JSON are read as PEFT reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fx.adapter import Adapter
from lora_fx.errors import LoraFxError, one_line
from lora_fx.formats import peft_read
from lora_fx.formats.peft_config import build_config, conflicts
from lora_fx.formats.peft_names import OWN, PREFIX, Form, form_of, to_tensors
from lora_fx.formats.tensorfile import Array, is_float, read_tensors, write_tensors
from lora_fx.lowrank import Full, LowRank

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read(path: str | Path) -> Adapter:
    """An adapter from a folder or a single file.

    Args:
        path: A folder with adapter_config.json and adapter_model.safetensors, or a .safetensors
            file that has a config inside (ours) or beside it.

    Returns:
        An Adapter: LowRank `a` [r, in] and `b` [out, r] in fp32 by parameter name, `X.weight` or
        `X.weight` of an alias; Full for whole tensors. In files of PEFT layouts are None and
        `extra` says what the file does: {"op": "embedding"}, or {"op": "conv2d", "kernel": [3, 3]}
        with `in` = C_in · ∏kernel. metadata has dropout, the base model's name, the notes.

    Raises:
        LoraFxError: Anything that would change the result in silence: see `peft_config.REFUSED`,
            half a pair, shapes that do not fit, empty or non-finite tensors, unknown names.
    """
    path = Path(path)
    weights = path / WEIGHTS if path.is_dir() else path
    tensors, header = read_tensors(weights)
    ours = _parse(header["lora_fx"], f"{weights}: metadata lora_fx") if "lora_fx" in header else {}
    config, where = ours.get("config"), f"{weights}: config in metadata lora_fx"
    if config is None:
        beside = weights.parent / CONFIG
        where = str(beside)
        if not beside.is_file():
            raise LoraFxError(
                f"{weights}: no config in its metadata and no {CONFIG} beside it; expected one "
                "of the two: the scale of the updates is stored there",
                f"put the {CONFIG} of the adapter beside the file",
            )
        config = _parse(beside.read_bytes(), where)
    return peft_read.decode(tensors, ours, config, str(weights), where)


def write(adapter: Adapter, directory: str | Path) -> tuple[str, ...]:
    """Write a folder that PEFT loads; returns notes on what PEFT will not see.

    Args:
        adapter: Bound, or as read from a file of PEFT. metadata may hold dropout, task_type,
            base_model_name_or_path and revision for the config; all of it is kept for reading.
        directory: Created where it is missing; files of these names in it are replaced.

    Raises:
        LoraFxError: Both variants in one adapter, a variant that is neither lora nor rslora,
            empty or non-finite tensors, metadata that is no JSON.
    """
    tensors, config, ours, notes = encode(adapter)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, tensors, _header(ours))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    return notes


def write_file(adapter: Adapter, path: str | Path) -> tuple[str, ...]:
    """Write one .safetensors file with the config in its metadata; otherwise as `write`."""
    tensors, config, ours, notes = encode(adapter)
    write_tensors(Path(path), tensors, _header({**ours, "config": config}))
    return notes


def encode(
    adapter: Adapter,
) -> tuple[dict[str, Array], dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """The tensors, the config, the JSON of our own, and the notes of an adapter."""
    tensors: dict[str, Array] = {}
    described: dict[str, Any] = {}
    forms = {key: form_of(key, low) for key, low in adapter.lowrank.items()}
    modules = _modules(forms, adapter.lowrank)
    notes = []
    for key, low in adapter.lowrank.items():
        form = forms[key]
        a, b = to_tensors(form, low)
        a_name, b_name = form.names if form.module else (f"{OWN}{key}.lora_A", f"{OWN}{key}.lora_B")
        tensors[a_name], tensors[b_name] = _checked(key, a), _checked(key, b)
        described[key] = _describe(low, a_name, b_name, form)
        if not form.module:
            notes.append(f"PEFT will not see the update of {key!r}: {form.why}")
    whole, odd = _split_full(adapter.full, modules)
    for key, full in adapter.full.items():
        name = f"{OWN}{key}.full" if key in odd else PREFIX + key
        tensors[name] = _checked(key, full.value)
        described[key] = {"full": name}
        if key in odd:
            notes.append(f"PEFT will not see the whole tensor {key!r}: {odd[key]}")
    notes += _partial(whole, adapter.full)
    if not modules:
        notes.append("PEFT will not load this adapter: it has no update that PEFT can apply")
    metadata = {k: v for k, v in adapter.metadata.items() if k != "notes"}
    variant = _variant(adapter.lowrank)
    linear = [f for f in forms.values() if f.kind == "linear"]
    fan = bool(linear) and all(f.transposed for f in linear)
    config = build_config(modules, whole, metadata, variant=variant, fan_in_fan_out=fan)
    return tensors, config, _ours(described, metadata), tuple(notes)


def _modules(forms: Mapping[str, Form], updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Updates by PEFT's module; none of our own."""
    modules: dict[str, str] = {}
    for key, form in forms.items():
        if form.module in modules:
            raise LoraFxError(
                f"the updates of {modules[form.module]!r} and {key!r} both act on the module "
                f"{form.module!r}; expected one",
                "one tensor has one update; merge the two first",
            )
        if form.module:
            modules[form.module] = key
    return {module: updates[key] for module, key in modules.items()}


def _describe(low: LowRank, a_name: str, b_name: str, form: Form) -> dict[str, Any]:
    """What the config does not say of one update, to read it back exactly."""
    entry: dict[str, Any] = {
        "a": a_name,
        "b": b_name,
        "layout": low.layout.to_json() if low.layout else None,
        "use": low.use,
        "extra": low.extra,
    }
    if form.swapped:
        entry["swapped"] = True
    if not form.module:  # PEFT's own forms take these two from the config, which people edit
        entry |= {"rank": low.rank, "alpha": float(low.alpha), "variant": low.variant}
    return entry


def _split_full(
    full: Mapping[str, Full], modules: Mapping[str, LowRank]
) -> tuple[list[str], dict[str, str]]:
    """Modules that PEFT can save whole, and {key: reason} of the tensors it cannot."""
    holders = {k: k.rpartition(".")[0] for k in full}
    weighty = {holders[k] for k in full if k.endswith(".weight")}
    odd: dict[str, str] = {}
    for key, holder in holders.items():
        clash = next((m for m in modules if conflicts(holder, m)), None)
        if clash:
            odd[key] = f"modules_to_save {holder!r} would take the update off {clash!r}"
        elif holder not in weighty:
            odd[key] = "it is not a module with its weight, and PEFT saves modules whole"
    chosen = sorted({h for k, h in holders.items() if k not in odd})
    # A module inside a saved one is saved with it; listing both makes PEFT wrap it twice.
    return [m for m in chosen if not any(m.startswith(f"{o}.") for o in chosen)], odd


def _partial(whole: list[str], full: Mapping[str, Full]) -> list[str]:
    """Notes on modules of which the adapter may hold only some tensors."""
    notes = []
    for module in whole:
        leaves = sorted(k.removeprefix(f"{module}.") for k in full if k.startswith(f"{module}."))
        if leaves != ["bias", "weight"]:
            notes.append(
                f"PEFT will load modules_to_save {module!r} only if the module has no other "
                f"tensors than {', '.join(leaves)}"
            )
    return notes


def _variant(updates: Mapping[str, LowRank]) -> str:
    """The one variant of all updates."""
    first: dict[str, str] = {}
    for key, low in updates.items():
        first.setdefault(low.variant, key)
    odd = next((v for v in first if v not in ("lora", "rslora")), None)
    if odd is not None:
        raise LoraFxError(
            f"the update of {first[odd]!r} is of variant {odd!r}; expected lora or rslora",
            "fold it instead",
        )
    if len(first) > 1:
        raise LoraFxError(
            f"{first['lora']!r} is lora and {first['rslora']!r} is rslora; expected one variant: "
            "PEFT has one flag for the whole adapter",
            "save them as two adapters",
        )
    return next(iter(first), "lora")


def _checked(key: str, array: Array) -> Array:
    if array.size == 0:
        raise LoraFxError(f"{key!r} has an empty tensor, shape {list(array.shape)}")
    if is_float(array) and not peft_read.finite(array):
        raise LoraFxError(f"{key!r} has NaN or infinite values", "training may have diverged")
    return array


def _ours(described: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": peft_read.VERSION, "entries": dict(described), "metadata": dict(metadata)}


def _header(ours: Mapping[str, Any]) -> dict[str, str]:
    try:
        text = json.dumps(ours, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LoraFxError(
            f"the adapter's metadata or an update's extra is no JSON: {one_line(error)}",
            "keep texts, numbers, lists and objects there",
        ) from error
    return {"format": "pt", "lora_fx": text}


def _parse(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object, or an error that names its place."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraFxError(
            f"{where}: not JSON: {one_line(error)}", "is the file complete?"
        ) from error
    if not isinstance(value, dict):
        raise LoraFxError(f"{where}: a JSON {type(value).__name__}; expected an object")
    return value
