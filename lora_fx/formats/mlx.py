"""Adapters of MLX-LM: a folder with adapters.safetensors and adapter_config.json.

=============================================  ==================================================
tensors of a module X, in MLX's order          update of X.weight
=============================================  ==================================================
X.lora_a [in, r], X.lora_b [r, out]            A = lora_aᵀ, B = lora_bᵀ: a linear layer
X.m [out]                                      DoRA's lengths of the rows of W
X.lora_a [V, r], X.lora_b [r, dim]             an embedding, by X's name; of all its uses
X.lora_a [E, r, in], X.lora_b [E, out, r]      the experts of `switch_mlp`; until 0.28.2 lora_a is
                                               [r·E, in], with the expert counted first
=============================================  ==================================================

ΔW = s · B A, with s from `lora_fx.formats.mlx_settings`. One s and one r hold for the whole file.
X is MLX's name of the module. For most decoders it is that of Hugging Face; experts are
`switch_mlp.gate_proj` … for `experts.gate_proj` ….

MLX-LM 0.5.0 and earlier wrote adapters.npz, with the same names. Facts: mlx-lm 0.32.2,
tuner/lora.py, dora.py and utils.py, and the earlier releases on PyPI.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.expert_families import Family, family_of
from lora_fx.adapter.expert_layouts import LAYOUTS, ExpertLayout, laid, turned
from lora_fx.adapter.lowrank import LowRank, alpha_of
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Entry
from lora_fx.data_files import read_npz
from lora_fx.dtypes import Array
from lora_fx.files.checkpoint import model_config
from lora_fx.files.tensor_files import read_tensors, write_tensors
from lora_fx.formats.checked_file import Arrays, File, module_and_part
from lora_fx.formats.format import FileHead, Format
from lora_fx.formats.header_json import FIELD, describe, probe_in_header, restore
from lora_fx.formats.mlx_settings import CONFIG, MlxSettings, settings_beside
from lora_fx.formats.one_scale import most_frequent, multiplied
from lora_fx.formats.unsupported import has_kernel_axes, refused
from lora_fx.text import Json, counted, is_whole

WEIGHTS = "adapters.safetensors"
OLDER_WEIGHTS = "adapters.npz"
_split_name = partial(module_and_part, re.compile(r"(.+)\.(lora_a|lora_b|m)"))
_LAYER = re.compile(r"(?:.+\.)?(?:layers|h|blocks)\.(\d{1,5})\.(.+)")
_EMBEDDING = re.compile(
    r"(?:.+\.)?(?:embed|embed_in|embed_tokens|embed_tokens_per_layer|embeddings?|wte|wpe"
    r"|(?:tok|token|word)_embeddings|position_embedding_table)"
)
"""Names of nn.Embedding in the models of mlx-lm 0.32.2."""
_LETTERS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_refused = partial(refused, "an adapter of MLX-LM")


def detect(seen: FileHead) -> bool:
    """Whether a file has lora_a and lora_b without `.weight`, or MLX-LM's config beside it."""
    if "fine_tune_type" in seen.config_fields:
        return True
    return any(name.endswith((".lora_a", ".lora_b")) for name in seen.names)


def read(path: Path, base: Path | None = None) -> Adapter:
    """Read adapters.safetensors or adapters.npz, with adapter_config.json next to it.

    Args:
        path: The file of tensors.
        base: Folder of the base model. With it gate and up of experts become one stack, as PEFT has
            them and as a checkpoint of any layout takes them.

    Returns:
        An Adapter with MLX's module names as keys, each with `.weight`; of a file that lora-fx
        wrote, the keys and layouts that it was written from. Layouts are None otherwise.

    Raises:
        LoraFxError: No config, whole weights, half a pair, shapes that do not fit, or DoRA of an
            embedding, which MLX-LM computes by rows and others by columns.
    """
    file = File(str(path))
    settings = settings_beside(path, file)
    header: Mapping[str, str] = {}
    if path.suffix == ".npz":
        tensors: Arrays = read_npz(str(path))
    else:
        tensors, header = read_tensors(path)
    what = "is not a name that MLX-LM writes; expected X.lora_a, X.lora_b or X.m"
    unknown = partial(file.error, what=what, hint="check whether the file was edited")
    masters = {name: file.master(name, tensor) for name, tensor in tensors.items()}
    entries: dict[str, Entry] = {}
    for module, factors in file.modules(masters, _split_name, unknown).items():
        entries[f"{_other_name(module)}.weight"] = _update(module, factors, settings, file)

    entries, metadata, _ = restore(entries, header, str(path))
    family = _family(_config_of(base))
    if family is not None and _has_experts(entries):
        entries = laid(entries, LAYOUTS["peft"], family)
        metadata["peft"] = {"peft_version": LAYOUTS["peft"].version}
    if settings.dropout:
        metadata.setdefault("dropout", settings.dropout)
    if settings.base:
        metadata.setdefault("base_model_name_or_path", settings.base)
    return Adapter(entries, {**metadata, "notes": file.notes})


def _other_name(module: str) -> str:
    """Return the name that Hugging Face has for a module of experts.

    >>> _other_name("model.layers.0.mlp.switch_mlp.up_proj"), _other_name("lm_head")
    ('model.layers.0.mlp.experts.up_proj', 'lm_head')
    """
    return module.replace(".switch_mlp.", ".experts.")


def _update(module: str, factors: Arrays, settings: MlxSettings, file: File) -> LowRank:
    """Return the update of one module.

    Args:
        module: MLX's name.
        factors: lora_a, lora_b and perhaps m.
        settings: Those of the file.
        file: The file.
    """
    lora_a = factors.get("lora_a")
    lora_b = factors.get("lora_b")
    magnitude = factors.get("m")
    if lora_a is None or lora_b is None:
        raise file.error(module, f"has {', '.join(sorted(factors))}; expected lora_a and lora_b")
    if settings.dora and magnitude is None:
        raise file.error(module, f"has no m; {CONFIG} says that the updates are DoRA")
    if magnitude is not None and not settings.dora:
        raise file.error(module, f"has m, which only DoRA has; {CONFIG} says that it is LoRA")
    if lora_b.ndim == 3:
        return _update_of_experts(module, lora_a, lora_b, settings, file)
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[1] != len(lora_b):
        raise _shape_error(module, lora_a, lora_b, "[in, r] and [r, out]", file)
    _check_rank(module, len(lora_b), settings, file)

    is_embedding = _EMBEDDING.fullmatch(module) is not None
    if magnitude is not None:
        if is_embedding:
            raise file.error(
                module,
                "is DoRA of an embedding: MLX-LM has a length for each row of the table, and other "
                "programs for each column",
                "fuse it into its model with mlx_lm.fuse",
            )
        magnitude = file.vector(f"{module}.m", magnitude, lora_b.shape[1])
    # as_linear of LoRAEmbedding adds the update to a tied head too.
    origin = Origin(op="embedding", tied=True) if is_embedding else Origin()
    return LowRank(
        np.ascontiguousarray(lora_a.T),
        np.ascontiguousarray(lora_b.T),
        alpha_of(settings.scale, len(lora_b)),
        magnitude=magnitude,
        origin=origin,
    )


def _update_of_experts(
    module: str, lora_a: Array, lora_b: Array, settings: MlxSettings, file: File
) -> LowRank:
    """Return the update of a stack of experts, a [E, r, in] and b [E, out, r]."""
    experts, _, rank = lora_b.shape
    if lora_a.ndim == 2 and len(lora_a) == experts * rank:
        lora_a = lora_a.reshape(experts, rank, -1)
    if lora_a.ndim != 3 or lora_a.shape[:2] != (experts, rank):
        raise _shape_error(module, lora_a, lora_b, "[E, r, in] and [E, out, r]", file)
    _check_rank(module, rank, settings, file)
    alpha = alpha_of(settings.scale, rank)
    return LowRank(lora_a, lora_b, alpha, origin=Origin(op="experts"))


def _shape_error(module: str, lora_a: Array, lora_b: Array, expected: str, file: File) -> Exception:
    """Return the error for factors that do not fit each other."""
    shapes = f"lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)}"
    return file.error(module, f"has {shapes}; expected {expected}")


def _check_rank(module: str, rank: int, settings: MlxSettings, file: File) -> None:
    """Raise for another rank than the config's, which MLX-LM would not load."""
    if settings.rank not in (0, rank):
        raise file.error(module, f"has rank {rank}; {CONFIG} has {settings.rank}")


def write(adapter: Adapter, directory: Path, base: Path | None = None) -> tuple[str, ...]:
    """Write a folder that `mlx_lm` loads with --adapter-path; return notes.

    MLX-LM has one rank and one scale for a file. So updates of lower ranks get ranks of zeros, and
    the ratio of another scale is multiplied into lora_b.

    Args:
        adapter: Bound or not.
        directory: Created where it is missing.
        base: Folder of the base model, for the names of experts and for tied weights.

    Raises:
        LoraFxError: LoRA and DoRA in one adapter, or an update that MLX-LM has no module for.
    """
    config = _config_of(base)
    family = _family(config)
    adapter = _with_stacks(adapter, family)
    updates = {key: _storable(key, entry, config) for key, entry in adapter.entries.items()}
    dora = {update.magnitude is not None for update in updates.values()}
    if len(dora) > 1:
        key = next(key for key, update in updates.items() if update.magnitude is None)
        raise _refused(key, "it is LoRA and others are DoRA; MLX-LM has one kind in a file")

    rank = max(update.rank for update in updates.values())
    scale = most_frequent(update.scale for update in updates.values())
    tensors: dict[str, Array] = {}
    names: dict[str, str] = {}
    stored: dict[str, Entry] = {}
    for key, update in updates.items():
        module = _mlx_name(key.removesuffix(".weight"), family)
        names[key] = f"{_other_name(module)}.weight"
        uniform = _with_rank_and_scale(key, _over_rows(key, update), rank, scale)
        stored[key] = uniform
        for end, tensor in _tensors(uniform).items():
            tensors[f"{module}.{end}"] = tensor

    directory.mkdir(parents=True, exist_ok=True)
    text_of_names = describe(replace(adapter, entries=stored), names)
    header = {"format": "mlx", FIELD: text_of_names, **probe_in_header(adapter)}
    write_tensors(directory / WEIGHTS, tensors, header)
    modules = [_mlx_name(key.removesuffix(".weight"), family) for key in updates]
    settings = MlxSettings(
        scale,
        dora=True in dora,
        rank=rank,
        dropout=float(adapter.metadata.get("dropout") or 0.0),
        base=str(adapter.metadata.get("base_model_name_or_path") or ""),
    )
    written_config = _config(settings, modules, config.get("num_hidden_layers"))
    text = json.dumps(written_config, indent=4, sort_keys=True)
    (directory / CONFIG).write_text(f"{text}\n", encoding="utf-8")
    return tuple(_notes(updates, rank, scale))


def _config_of(base: Path | None) -> Json:
    """Return config.json of the base's folder; empty where there is none."""
    if base is None or not (base / "config.json").is_file():
        return {}
    return model_config(base / "config.json")


def _family(config: Json) -> Family | None:
    """Return the layout of the model's experts; None where the model is not known."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    return family_of([model_type])


def _has_experts(keys: Iterable[str]) -> bool:
    """Whether some of these keys are of experts."""
    return any(".experts." in key for key in keys)


def _with_stacks(adapter: Adapter, family: Family | None) -> Adapter:
    """Return the adapter with its experts as stacks gate_proj, up_proj and down_proj.

    Raises:
        LoraFxError: There are experts, and the model is not known.
    """
    if not _has_experts(adapter.entries):
        return adapter
    if family is None:
        key = next(key for key in adapter.entries if _has_experts([key]))
        what = (
            "MLX-LM has stacks of gate and up apart, and how they are joined depends on the model"
        )
        raise _refused(key, what, "pass the folder of the base model with --base")
    entries: dict[str, Entry] = {}
    for key, entry in laid(adapter.entries, ExpertLayout(split=True), family).items():
        module, _, leaf = key.removesuffix(".weight").rpartition(".")
        if module.endswith(".experts"):
            key = f"{module}.{_LETTERS.get(leaf, leaf)}.weight"
        entries[key] = entry
    return replace(adapter, entries=entries)


def _mlx_name(module: str, family: Family | None) -> str:
    """Return MLX's name of a module."""
    if family is not None and family.holder != "mlp":  # also of the router
        module = module.replace(".mlp.", f".{family.holder}.")
    if ".experts." not in module:
        return module
    if family is not None and family.interleaved:
        return module  # gpt-oss has no switch_mlp
    return module.replace(".experts.", ".switch_mlp.")


def _storable(key: str, entry: Entry, config: Json) -> LowRank:
    """Return the update; raise if MLX-LM has no layer for it."""
    if not isinstance(entry, LowRank) or entry.mutated or entry.origin.candidates:
        raise _refused(key, entry)
    if not key.endswith(".weight"):
        raise _refused(key, "it is for a part of a tensor, one of its uses, or no weight")
    if entry.use or has_kernel_axes(entry):
        raise _refused(key, "it is for a convolution, or for one use of a tensor")
    if entry.a.ndim > 2 and ".experts." not in key:
        raise _refused(key, "it is a stack of matrices")
    if entry.a.ndim > 2 and entry.magnitude is not None:
        raise _refused(key, "MLX-LM has no DoRA of experts")
    if _is_looked_up(key, entry):
        if entry.magnitude is not None:
            raise _refused(key, "MLX-LM's DoRA of an embedding has lengths for other axes")
        if config.get("tie_word_embeddings") and not entry.origin.tied:
            raise _refused(
                key,
                "MLX-LM applies it to the head too, which reads the same table",
                "pass --exclude to leave it out",
            )
    return entry


def _is_looked_up(key: str, update: LowRank) -> bool:
    """Whether an update is for a table of embeddings."""
    is_embedding = _EMBEDDING.fullmatch(key.removesuffix(".weight")) is not None
    return is_embedding or update.origin.op == "embedding"


def _over_rows(key: str, update: LowRank) -> LowRank:
    """Return the update of a table with `a` over the table's rows, as for a lookup.

    Bound to a model whose head reads the same table, `a` goes over the columns.
    """
    layout = update.layout
    if layout is None or layout.out != (0,) or not _is_looked_up(key, update):
        return update
    return turned(update)


def _with_rank_and_scale(key: str, update: LowRank, rank: int, scale: float) -> LowRank:
    """Return the same ΔW with ranks of zeros added, and with this scale.

    An update that has the rank and the scale stays as it is, in its variant.

    Raises:
        LoraFxError: B is out of fp32's range with the ratio of the scales.
    """
    if update.rank == rank and update.scale == scale:
        return update
    b = update.b
    if update.scale != scale:
        b = multiplied(b, update.scale / scale, key, _refused)
    empty = [(0, 0)] * (b.ndim - 1)
    missing = (0, rank - update.rank)
    a = np.pad(update.a, [*empty[:-1], missing, (0, 0)])
    b = np.pad(b, [*empty, missing])
    alpha = alpha_of(scale, rank)
    return replace(update, a=a, b=b, alpha=alpha, variant="lora", variant_tensors={})


def _tensors(update: LowRank) -> dict[str, Array]:
    """Return the tensors of a module by the ends of their names."""
    if update.a.ndim == 3:
        return {"lora_a": update.a, "lora_b": update.b}
    tensors = {
        "lora_a": np.ascontiguousarray(update.a.T),
        "lora_b": np.ascontiguousarray(update.b.T),
    }
    if update.magnitude is not None:
        tensors["m"] = update.magnitude
    return tensors


def _config(settings: MlxSettings, modules: list[str], layers: object) -> Json:
    """Return the content of adapter_config.json.

    Args:
        settings: Of the file.
        modules: MLX's names of the adapted modules.
        layers: The number of layers that the model has; no number where it is not known.
    """
    keys, num_layers = _keys(modules, layers)
    config: Json = {
        "fine_tune_type": "dora" if settings.dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": settings.rank,
            "scale": settings.scale,
            "dropout": settings.dropout,
            "keys": keys,
        },
    }
    if settings.base:
        config["model"] = settings.base
    return config


def _keys(modules: list[str], layers: object) -> tuple[list[str], int]:
    """Return the fields `keys` and `num_layers`, the number of the last layers with these keys.

    The keys are names within a layer if all layers, or the last ones, have the same modules. That
    is how MLX-LM writes them. Otherwise they are whole names, which MLX-LM reads since 0.16.0.
    A num_layers of -1 means all layers.
    """
    modules_by_layer: dict[int, set[str]] = {}
    outside_layers: list[str] = []
    for module in modules:
        match = _LAYER.fullmatch(module)
        if match is None:
            outside_layers.append(module)
        else:
            modules_by_layer.setdefault(int(match[1]), set()).add(match[2])

    groups = list(modules_by_layer.values())
    adapted = sorted(modules_by_layer)
    if groups and all(group == groups[0] for group in groups):
        keys = [*sorted(groups[0]), *sorted(outside_layers)]
        if adapted == list(range(len(adapted))):
            return keys, -1
        if is_whole(layers) and adapted == list(range(layers))[-len(adapted) :]:
            return keys, len(adapted)
    return sorted(modules), -1


def _notes(updates: Mapping[str, LowRank], rank: int, scale: float) -> list[str]:
    """Return what changed so that one rank and one scale hold."""
    notes = []
    narrow = sum(update.rank != rank for update in updates.values())
    if narrow:
        notes.append(f"MLX-LM has one rank, here {rank}: zeros fill {counted(narrow, 'update')}")
    scaled = sum(update.scale != scale for update in updates.values())
    if scaled:
        notes.append(
            f"MLX-LM has one scale, here {scale:g}: the ratio of {counted(scaled, 'update')} with "
            "another is multiplied into lora_b"
        )
    return notes


class Mlx(Format):
    """A folder of MLX-LM, or its one file of tensors beside the config."""

    name = "mlx"
    suffixes = ()
    folder_files = (WEIGHTS, CONFIG)
    older_files = (OLDER_WEIGHTS,)
    one_model = True
    takes_base = True
    keeps_probe = True

    def detect(self, seen: FileHead) -> bool:
        """Whether tensors have these names, or the config beside them is MLX-LM's."""
        return detect(seen)

    def read(self, path: Path, base: Path | None = None) -> Adapter:
        """Read a folder's file of tensors."""
        return read(path, base)

    def write(self, adapter: Adapter, path: Path, base: Path | None = None) -> tuple[str, ...]:
        """Write a folder."""
        return write(adapter, path, base)


MLX = Mlx()
