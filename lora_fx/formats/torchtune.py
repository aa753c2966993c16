"""Adapters in torchtune's own names, read only: Llama's layers, with torchtune's order of q and k.

==================================================  ===========================================
torchtune                                           Hugging Face (key)
==================================================  ===========================================
layers.N.attn.{q,k,v}_proj, layers.N.attn.output_   model.layers.N.self_attn.{q,k,v,o}_proj
proj
layers.N.mlp.w1, .w2, .w3                           model.layers.N.mlp.{gate,down,up}_proj
output                                              lm_head
==================================================  ===========================================

with `.lora_a.weight` [r, in], `.lora_b.weight` [out, r] and, of DoRA, `.magnitude` [out] behind.
adapter_config.json beside it has r and lora_alpha; s = lora_alpha / r.

torchtune has the rows of q and k in neighbouring pairs, Hugging Face's Llama in halves: see
`lora_fx.formats.rotary_rows`.
The number of heads, and whether the model is of this kind at all, come from config.json beside the
file or from the base model's; torchtune's Qwen2 pairs halves too, and its rows stay.

Files that torchtune writes for PEFT (`base_model.model.…`) are read as PEFT's; the .pt files of
its recipes are pickles and refused. Facts: torchtune 0.6.1, models/convert_weights.py (its own
conversion leaves magnitudes unpermuted).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import model_config
from lora_fx.files.strict_json import read_json
from lora_fx.files.tensor_files import read_tensors
from lora_fx.formats.checked_file import File, module_and_part
from lora_fx.formats.format import FileHead, Format
from lora_fx.formats.rotary_rows import heads_of, to_halves
from lora_fx.text import Json, JsonView, is_number

_NAME = re.compile(r"(.+)\.(lora_[ab](?=\.weight$)|magnitude$)(?:\.weight)?")
_split_name = partial(module_and_part, _NAME)
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_NEIGHBOURS = frozenset(("llama", "mistral", "gemma", "gemma2"))
_HALVES = frozenset(("qwen2",))


def detect(seen: FileHead) -> bool:
    """True for a file with lora_a and lora_b, in small letters."""
    return any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in seen.names)


def read(path: str | Path, base: str | Path | None = None) -> Adapter:
    """An adapter from one .safetensors file with adapter_config.json beside it.

    Args:
        path: The file.
        base: Folder of the base model, for its config.json; else the one beside the file counts.

    Returns:
        An Adapter with Hugging Face's parameter names as keys; layouts are None.

    Raises:
        LoraFxError: No config, a module that is none of the eight, half a pair, q or k of a model
            whose heads are not known.
    """
    path = Path(path)
    tensors, _ = read_tensors(path)
    file = File(str(path))
    config = _config(path.parent / "adapter_config.json", file)
    what = "is not a name that torchtune writes"
    unknown = partial(file.error, what=what, hint="was the file edited?")
    masters = {name: file.master(name, tensor) for name, tensor in tensors.items()}
    modules = file.modules(masters, _split_name, unknown)
    model_file = _config_of_model(path.parent, base)
    entries: dict[str, Entry] = {}
    for module, factors in modules.items():
        update = _lowrank(module, factors, config, file)
        key = f"{_name(module, file)}.weight"
        entries[key] = _in_halves(module, update, model_file, file)
    return Adapter(entries, {"dropout": config.get("lora_dropout") or 0.0, "notes": file.notes})


def _config_of_model(folder: Path, base: str | Path | None) -> Path:
    """config.json of the base, or beside the adapter; the first of the two where none is there."""
    folders = [folder] if base is None else [Path(base), folder]
    files = [folder / "config.json" for folder in folders]
    return next((file for file in files if file.is_file()), files[0])


def _in_halves(module: str, update: LowRank, path: Path, file: File) -> LowRank:
    """The update with the rows of q or k in Hugging Face's order; `path` is the model's config."""
    leaf = module.rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj"):
        return update
    if not path.is_file():
        raise LoraFxError(
            f"{file.name}: {module!r} has its rows in torchtune's order; reordering them needs "
            f"the number of heads, but there is no {path}",
            "give the folder of the base model (convert --base), or copy its config.json there",
        )
    config = model_config(path)
    kind = config.get("model_type")
    if kind in _HALVES:
        return update
    if kind not in _NEIGHBOURS:
        raise LoraFxError(
            f"{path}: model_type is {kind!r}; the order of the rows of {module!r} is known for "
            f"{', '.join(sorted(_NEIGHBOURS | _HALVES))}",
            "save the adapter from torchtune in PEFT's format",
        )
    heads = heads_of(module, len(update.b), config, str(path), file)
    magnitude = update.magnitude
    if magnitude is not None:
        magnitude = to_halves(magnitude, heads)
    return replace(update, b=to_halves(update.b, heads), magnitude=magnitude)


def _config(path: Path, file: File) -> Json:
    """adapter_config.json, with r and lora_alpha as numbers above 0."""
    if not path.is_file():
        raise LoraFxError(
            f"{file.name}: no {path.name} next to it; expected one with r and lora_alpha, which "
            "give the scale of the updates",
            "copy the adapter's adapter_config.json next to the file",
        )
    config = read_json(path)
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not is_number(value) or not value > 0:
            shown = json.dumps(value)
            raise LoraFxError(
                f"{path}: {name} is {shown}; expected a number above 0", "correct the file"
            )
    return config


def _lowrank(module: str, factors: Mapping[str, Array], config: JsonView, file: File) -> LowRank:
    """The update of one module; its rows are in the order of the file."""
    a = factors.get("lora_a")
    b = factors.get("lora_b")
    magnitude = factors.get("magnitude")
    if a is None or b is None:
        raise file.error(module, f"has {', '.join(sorted(factors))}; expected lora_a and lora_b")
    fits = a.ndim == b.ndim == 2 and len(a) == b.shape[1]
    if not fits or (magnitude is not None and magnitude.shape != (len(b),)):
        shapes = ", ".join(f"{end} {list(factor.shape)}" for end, factor in sorted(factors.items()))
        raise file.error(module, f"has {shapes}; expected [r, in], [out, r] and [out]")
    if len(a) != config["r"]:
        raise file.error(module, f"has rank {len(a)}; adapter_config.json has {config['r']}")
    return LowRank(a, b, float(config["lora_alpha"]), magnitude=magnitude)


def _name(module: str, file: File) -> str:
    """Hugging Face's name of a module."""
    if module == "output":
        return "lm_head"
    match = _LAYER.fullmatch(module)
    if match is None or match[2] not in _MODULES:
        leaves = ", ".join(name.partition(".")[2] for name in _MODULES)
        raise file.error(module, f"is a module without a known name; known: {leaves}, output")
    return f"model.layers.{match[1]}.{_MODULES[match[2]]}"


class Torchtune(Format):
    """One safetensors file with adapter_config.json beside it, whose rows are in another order."""

    name = "torchtune"
    suffixes = (".safetensors",)
    only_read = True
    takes_base = True

    def detect(self, seen: FileHead) -> bool:
        """Whether there are lora_a and lora_b, in small letters."""
        return detect(seen)

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read one file."""
        return read(path, base)


TORCHTUNE = Torchtune()
