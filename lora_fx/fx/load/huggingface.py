"""Load a Hugging Face folder as a module with example inputs, offline and without its code.

transformers builds the class that config.json names; this file reads the weights itself, so that
nothing in the folder decides which files are opened (adapters, pickles, kernels, Python code).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from lora_fx.errors import LoraFxError, importing, one_line, retold, silenced
from lora_fx.files.checkpoint import model_config, tensors
from lora_fx.files.safetensors import Tensors
from lora_fx.fx.load.config_gate import backbones, check_config
from lora_fx.fx.load.example_inputs import examples, nested_configs
from lora_fx.fx.load.float_folder import float_model
from lora_fx.fx.load.loaded_model import LoadedModel
from lora_fx.fx.load.quantised_folder import quantised_model
from lora_fx.fx.load.sealed_libraries import sealed_libraries
from lora_fx.fx.load.tensor_meter import Metered
from lora_fx.fx.load.unnamed_class import class_of_weights
from lora_fx.text import Json, JsonView

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
FACTORY = (
    "build the model with a factory: give file.py:FACTORY, which returns (module, args, kwargs)"
)
_IMPLEMENTATIONS = {
    "_attn_implementation": ("sdpa",),
    "_experts_implementation": ("batched_mm", "grouped_mm"),
}
"""Fields of a config → the values other than eager that they may have."""


def load_folder(folder: Path, weights: Path | None = None, *, meta: bool = False) -> LoadedModel:
    """The model of a folder.

    Args:
        folder: Holds config.json, and the weights unless `weights` or `meta` is given.
        weights: A safetensors file (or folder) to read instead; then every name must fit.
        meta: Build without weights, on the meta device.

    Raises:
        LoraFxError: An unknown architecture or foreign code; weights that are damaged or do not
            fit, or quantised in a format that is not read.
    """
    raw = _config_json(folder)
    what = f"{folder} is a Hugging Face folder, and transformers"
    with importing(what, "pip install 'lora-fx[hf]'"):
        transformers = importlib.import_module("transformers")
    path = weights or folder
    stored = _stored_tensors(path)
    building = _building(transformers, folder, raw, stored)
    errors = retold(f"{folder}: its model cannot be built", FACTORY, most=200, named=True)
    with quiet_transformers(), errors, building as meter:
        config = _config(transformers, folder, raw)
        class_notes: tuple[str, ...] = ()
        if raw.get("architectures"):
            cls = _architecture(transformers, folder, raw)
        else:
            cls, class_notes = _by_weights(transformers, config, folder, raw, stored, meter)
        settled_notes = _settle(config, folder, raw, cls)
        if getattr(config, "quantization_config", None) is None:
            module, weight_notes = float_model(cls, config, path, meta, strict=weights is not None)
        else:
            module, weight_notes = quantised_model(cls, config, path, raw, meta)
        module.config._name_or_path = str(folder)
        _switch_off_cache(module)
        padding_notes = _settle_padding(module)
    with retold(f"{folder}/config.json: no inputs can be made of it", FACTORY, named=True):
        inputs = examples(module)
    tokenizer_folder = None
    if any((folder / name).exists() for name in TOKENIZERS):
        tokenizer_folder = folder
    notes = (*class_notes, *settled_notes, *padding_notes, *weight_notes)
    return LoadedModel(module.eval(), (), inputs, str(folder), notes, tokenizer_folder)


def _stored_tensors(path: Path) -> Tensors | None:
    """The tensors of the weights; None where there are none that can be read."""
    try:
        return tensors(path)
    except LoraFxError:
        return None


@contextlib.contextmanager
def _building(
    transformers: ModuleType, folder: Path, raw: JsonView, stored: Tensors | None
) -> Iterator[Metered]:
    """A block in which transformers builds the model of a folder, and reaches nothing else.

    Yields:
        What counts the tensors that are made.

    Raises:
        LoraFxError: The config names what is no part of the folder, or sizes that the weights do
            not have.
    """
    kind = raw.get("model_type")
    file = folder / "config.json"
    if isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:  # else it is refused by name
        check_config(raw, file, transformers.CONFIG_MAPPING[kind], stored)
    what = f"{file}: building the model"
    backbone_names = backbones(raw)
    if backbone_names:
        what = f"{file}: {backbone_names}: building the model"
    with sealed_libraries(what, folder), Metered(str(file), stored) as meter:
        yield meter


def _config_json(folder: Path) -> Json:
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise LoraFxError(
                f"{folder}: the folder holds an adapter, not a model",
                "give the folder of its base model",
            )
        if (folder / "model_index.json").exists():
            raise LoraFxError(f"{folder}: a diffusers pipeline, not one model", FACTORY)
        raise LoraFxError(f"{folder}: no config.json", "give a folder that save_pretrained wrote")
    raw = model_config(folder / "config.json")
    if "_class_name" in raw and "model_type" not in raw:
        raise LoraFxError(f"{folder}: a diffusers model ({raw['_class_name']})", FACTORY)
    return raw


def _unknown(transformers: ModuleType, folder: Path, raw: JsonView) -> LoraFxError:
    name = raw.get("model_type")
    architectures = raw.get("architectures")
    if isinstance(architectures, list) and architectures:
        name = architectures[0]
    hint = f"upgrade transformers, or {FACTORY}"
    if "auto_map" in raw:
        hint = f"the folder's own code (auto_map) is never run; {FACTORY}"
    return LoraFxError(
        f"{folder}/config.json: architecture {one_line(repr(name), 80)} (model_type "
        f"{one_line(repr(raw.get('model_type')), 80)}) is unknown to transformers "
        f"{transformers.__version__}",
        hint,
    )


def _config(transformers: ModuleType, folder: Path, raw: JsonView) -> PreTrainedConfig:
    """The config as transformers reads it.

    Raises:
        LoraFxError: transformers knows no such model, or has an error for the config.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise _unknown(transformers, folder, raw)
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as e:  # config classes raise whatever their fields make them raise
        raise LoraFxError(
            f"{folder}/config.json: {one_line(f'{type(e).__name__}: {e}', 200)}",
            f"does transformers {transformers.__version__} know this config?",
        ) from e
    return config


def _architecture(transformers: ModuleType, folder: Path, raw: JsonView) -> type[PreTrainedModel]:
    """The first class that a config names and transformers has.

    Raises:
        LoraFxError: It has none of them.
    """
    names = raw["architectures"]
    if not isinstance(names, list):
        raise _unknown(transformers, folder, raw)
    for name in names:
        if not isinstance(name, str):
            continue
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    raise _unknown(transformers, folder, raw)


def _by_weights(
    transformers: ModuleType,
    config: PreTrainedConfig,
    folder: Path,
    raw: JsonView,
    stored: Tensors | None,
    meter: Metered,
) -> tuple[type[PreTrainedModel], tuple[str, ...]]:
    """The class that the weights fit, where a config names none, and the note that says so.

    Raises:
        LoraFxError: transformers has none for this type of model, or the weights do not tell.
    """
    cls, note = class_of_weights(transformers, config, raw, stored, meter.anew)
    if cls is None:
        raise _unknown(transformers, folder, raw)
    if not note:
        return cls, ()
    return cls, (note,)


def _settle(
    config: PreTrainedConfig, folder: Path, raw: JsonView, cls: type[PreTrainedModel]
) -> tuple[str, ...]:
    """Remove settings from the config that would run foreign code or trace badly, with notes."""
    notes = []
    if "auto_map" in raw:
        notes.append(
            f"{folder}: its own code (auto_map) is not run; the model is built as transformers' "
            f"{cls.__name__}"
        )
    for inner in nested_configs(config):
        for name, implementations in _IMPLEMENTATIONS.items():
            value = getattr(inner, name, None)
            if value in (None, "eager", *implementations):
                continue
            setattr(inner, name, None)  # it may name a kernel on a hub
            notes.append(f"{folder}: {name.strip('_')} {one_line(repr(value), 80)} is ignored")
    return tuple(notes)


def _switch_off_cache(module: nn.Module) -> None:
    """A cache among the outputs is no tensor; generation graphs are another matter."""
    for submodule in module.modules():
        config = getattr(submodule, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False  # type: ignore[union-attr]


def _settle_padding(module: PreTrainedModel) -> tuple[str, ...]:
    """Give a classifier without a padding token its end token or 0, and say so.

    Classifiers of causal models refuse batches without a padding token.
    """
    config = module.config
    if not type(module).__name__.endswith("ForSequenceClassification"):
        return ()
    if getattr(config, "pad_token_id", 0) is not None:
        return ()
    end_token = getattr(config, "eos_token_id", None)
    if isinstance(end_token, list):
        config.pad_token_id = end_token[0]
    else:
        config.pad_token_id = end_token or 0
    return (f"config.json has no pad_token_id: {config.pad_token_id} is used",)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """A block without logs, bars or warnings of transformers; important ones become notes."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with silenced(levels={"transformers": logging.CRITICAL}):
            yield
    finally:
        if bars:
            logging.enable_progress_bar()
