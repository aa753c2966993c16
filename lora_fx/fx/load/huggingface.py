"""A Hugging Face folder as a module with example inputs: offline, and no foreign code.

transformers builds the class that config.json names; this file reads the weights itself, so that
nothing in the folder decides which files are opened (adapters, pickles, kernels, Python code).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_fx.checkpoint.loaded_names import loaded_of
from lora_fx.data import Tokenizer
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, importing, one_line, retold, silenced
from lora_fx.files.checkpoint import model_config, tensors
from lora_fx.files.quantised.matrices import below
from lora_fx.files.quantised.quantised_weight import QuantisedWeight
from lora_fx.files.quantised.read import quantised_weights
from lora_fx.files.safetensors import Tensors, first_bytes, is_pickle
from lora_fx.files.sealed import unsealed
from lora_fx.fx.codes import LEVELS, Stored, declare, store
from lora_fx.fx.load.config_gate import (
    Metered,
    backbones,
    check_config,
    check_tokenizer_config,
    sealed_libraries,
)
from lora_fx.fx.load.unnamed_class import class_of_weights
from lora_fx.fx.tensors import pickled
from lora_fx.patching import patched
from lora_fx.text import Json, JsonView, some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
EXPERT = re.compile(r"\.experts\.\d+\.")
FACTORY = "a factory can build it: give file.py:FACTORY, returning (module, args, kwargs)"
_IMPLEMENTATIONS = {
    "_attn_implementation": ("sdpa",),
    "_experts_implementation": ("batched_mm", "grouped_mm"),
}
"""Fields of a config → what they may name beside eager."""


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode and inputs that it can be called with.

    Attributes:
        module: The model.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        origin: What was asked for.
        notes: What has to be said: random weights, casts, code that was not run.
        tokenizer_folder: The folder that holds a tokenizer for it, if one does.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    notes: tuple[str, ...] = ()
    tokenizer_folder: Path | None = None


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
    told = retold(f"{folder}: its model cannot be built", FACTORY, most=200, named=True)
    stored = _stored(path)
    with quiet_transformers(), told, _building(transformers, folder, raw, stored) as meter:
        config = _config(transformers, folder, raw)
        class_notes: tuple[str, ...] = ()
        if raw.get("architectures"):
            cls = _architecture(transformers, folder, raw)
        else:
            cls, class_notes = _by_weights(transformers, config, folder, raw, stored, meter)
        notes = class_notes + _settle(config, folder, raw, cls)
        if getattr(config, "quantization_config", None) is None:
            module, more = _of_floats(cls, config, path, meta, strict=weights is not None)
        else:
            module, more = _of_codes(cls, config, path, raw, meta)
        module.config._name_or_path = str(folder)
        _no_cache(module)
        notes += _pad(module)
    with retold(f"{folder}/config.json: no inputs can be made of it", FACTORY, named=True):
        given = examples(module)
    tokenizer = any((folder / name).exists() for name in TOKENIZERS)
    held = folder if tokenizer else None
    return LoadedModel(module.eval(), (), given, str(folder), notes + more, held)


def _stored(path: Path) -> Tensors | None:
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
    kind, file = raw.get("model_type"), folder / "config.json"
    if isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:  # else it is refused by name
        check_config(raw, file, transformers.CONFIG_MAPPING[kind], stored)
    named = backbones(raw)
    what = f"{file}:{f' {named}:' if named else ''} building the model"
    with sealed_libraries(what, folder), Metered(str(file), stored) as meter:
        yield meter


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's own tokenizer; nothing is downloaded, and no code of the folder is run.

    Raises:
        LoraFxError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    check_tokenizer_config(folder)
    what = f"{folder}: reading its tokenizer"
    try:
        with quiet_transformers(), sealed_libraries(what, folder):
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except LoraFxError:
        raise
    except Exception as e:  # tokenizers raise whatever their files make them raise
        raise LoraFxError(
            f"{folder}: its tokenizer cannot be read: {one_line(f'{type(e).__name__}: {e}', 200)}",
            "copy tokenizer.json and tokenizer_config.json of the model into it",
        ) from e


def tokenizer_of(folder: Path, max_length: int) -> Tokenizer:
    """A folder's own tokenizer, padding to the longest text; nothing is downloaded."""
    tokenizer = read_tokenizer(folder)

    def run(texts: list[str]) -> dict[str, Array]:
        out = tokenizer(
            texts, truncation=True, max_length=max_length, padding=True, return_tensors="np"
        )
        return {k: out[k] for k in ("input_ids", "attention_mask") if k in out}

    return run


def _config_json(folder: Path) -> Json:
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise LoraFxError(
                f"{folder}: an adapter, not a model", "give the folder of its base model"
            )
        if (folder / "model_index.json").exists():
            raise LoraFxError(f"{folder}: a diffusers pipeline, not one model", FACTORY)
        raise LoraFxError(f"{folder}: no config.json", "give a folder that save_pretrained wrote")
    raw = model_config(folder / "config.json")
    if "_class_name" in raw and "model_type" not in raw:
        raise LoraFxError(f"{folder}: a diffusers model ({raw['_class_name']})", FACTORY)
    return raw


def _unknown(transformers: ModuleType, folder: Path, raw: JsonView) -> LoraFxError:
    names = raw.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else raw.get("model_type")
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
    for name in names if isinstance(names, list) else ():
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
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
    return cls, (note,) if note else ()


def _settle(
    config: PreTrainedConfig, folder: Path, raw: JsonView, cls: type[PreTrainedModel]
) -> tuple[str, ...]:
    """Take from the config what would run foreign code or trace badly; say so."""
    notes = []
    if "auto_map" in raw:
        notes.append(
            f"{folder}: its own code (auto_map) is not run; transformers' {cls.__name__} is used"
        )
    for part, (name, known) in itertools.product(_configs(config), _IMPLEMENTATIONS.items()):
        value = getattr(part, name, None)
        if value not in (None, "eager", *known):  # may name a kernel on a hub
            setattr(part, name, None)
            notes.append(f"{folder}: {name.strip('_')} {one_line(repr(value), 80)} is ignored")
    return tuple(notes)


def _of_floats(
    cls: type[PreTrainedModel], config: PreTrainedConfig, path: Path, meta: bool, *, strict: bool
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    try:
        if meta:
            return _on_meta(cls, config, path), ()
        state = _state(path)
        module, info = cls.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True,
            ignore_mismatched_sizes=True, local_files_only=True,
        )  # fmt: skip
    except LoraFxError:
        raise
    except Exception as e:  # model classes raise whatever their config makes them raise
        raise LoraFxError(
            f"{config.name_or_path}: {cls.__name__} cannot be built: "
            f"{type(e).__name__}: {one_line(e, 200)}",
            "is config.json that of this model?",
        ) from e
    return module, _judge(module, info, path, strict=strict)


def _on_meta(cls: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    if config.dtype is None:  # as from_pretrained does: the first floating tensor decides
        with contextlib.suppress(LoraFxError), unsealed():  # no weights here is fine
            names = (getattr(torch, t.dtype, None) for t in tensors(folder).values())
            config.dtype = next((d for d in names if d is not None and d.is_floating_point), None)
    with torch.device("meta"):
        return cls._from_config(config)


def _of_codes(
    cls: type[PreTrainedModel], config: PreTrainedConfig, path: Path, raw: JsonView, meta: bool
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A model whose quantised weights stay the codes of its file.

    Neither the quantiser's package nor a copy of the weights as numbers is needed.

    Raises:
        LoraFxError: A format that is not read, or tensors that do not fit the model.
    """
    said = config.quantization_config
    kind = said.get("quant_method") if isinstance(said, dict) else said
    del config.quantization_config
    with unsealed():
        held = {} if meta and not any(path.glob("*.safetensors")) else tensors(path)
        found, back = _loaded(held, quantised_weights(held, raw), raw)
    if not found and not meta:
        raise LoraFxError(
            f"{path}: quantised weights ({one_line(kind, 60)}), none of which is read",
            "use the checkpoint that it was quantised from",
        )
    with contextlib.nullcontext() if meta else _without_parameters():
        module = _on_meta(cls, config, path) if meta else cls._from_config(config)
    own = dict(module.named_parameters())
    if lost := sorted(found.keys() - own.keys()):
        raise _misfit(
            f"{path}: {type(module).__name__} has no parameters for {len(lost)} quantised weights: "
            f"{some(lost, 4)}"
        )
    plain = module.state_dict().keys() - found.keys()
    stored = {} if meta else {back.get(n, n): t for n, t in _state(path).items()}
    state = {n: t for n, t in stored.items() if n in plain}
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    for name, weight in found.items():
        layer = module.get_submodule(name.rpartition(".")[0])
        turned, shape = type(layer).__name__ == "Conv1D", own[name].shape
        if weight.bits and weight.shape != tuple(shape[::-1] if turned else shape):
            raise _misfit(
                f"{path}: {name!r} has codes of {list(weight.shape)}, expected {list(shape)}"
            )
        if meta:
            kind = weight.format.rpartition(" ")[2]
            kind = kind if kind in LEVELS else f"int{weight.bits}"
            declare(module, name, Stored(kind, tuple(shape), 1, own[name].dtype, turned))
        else:
            with unsealed():
                codes = weight.read()
            store(module, name, codes, dtype or torch.float32, shape, turned)
    try:
        module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as e:
        raise _misfit(f"{path}: {one_line(e, 200)}") from e
    module.tie_weights()
    empty = [n for n, p in module.named_parameters() if p.is_meta and not meta]
    if empty:
        raise LoraFxError(
            f"{path}: {len(empty)} tensors are missing: {some(empty, 4)}",
            "is the download complete?",
        )
    kinds = Counter(w.format for w in found.values())
    notes = [f"{path}: {n} weights are read as codes: {kind}" for kind, n in kinds.items()]
    if not found:
        notes.append(f"{path}: its weights are quantised; shapes are those from before")
    parts = tuple(n.removesuffix("weight") for n in found)
    names = {back.get(n, n) for n in held if not EXPERT.search(n)}
    other = (n for n in names - plain if n.endswith(".bias") or not n.startswith(parts))
    if unused := sorted(other):
        notes.append(f"unused: {len(unused)} tensors of {path}: {some(unused, 4)}")
    return module, tuple(notes)


def _loaded(
    held: Tensors, found: Mapping[str, QuantisedWeight], raw: JsonView
) -> tuple[dict[str, QuantisedWeight], dict[str, str]]:
    """Quantised weights as the model names and stacks them, and other names: file → model."""
    some = next(iter(held.values()), None)
    sized = {n: replace(some, shape=w.shape) for n, w in found.items()} if some else {}
    loaded = loaded_of({**held, **sized}, raw)
    back = {old: new for new, old in loaded.names.items()}
    new = dict(found)
    for name, stack in loaded.stacks.items():
        parts = [new.pop(p.tensor) for p in stack.parts if p.tensor in found]
        if len(parts) == len(stack.parts):
            read = partial(lambda n, ws: below(n, [w.read() for w in ws]), name, parts)
            new[name] = replace(parts[0], shape=stack.info.shape, read=read)
    return {back.get(n, n): w for n, w in new.items()}, back


def _without_parameters() -> contextlib.AbstractContextManager[None]:
    """A block in which modules are built with their buffers, and with parameters on meta."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, p: nn.Parameter | None) -> None:
        plain(self, name, None if p is None else nn.Parameter(p.to("meta"), p.requires_grad))

    return patched(nn.Module, register_parameter=register)


@unsealed()
def _state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors; memory-mapped, so that only what the model keeps is read."""
    from safetensors.torch import load_file

    found = tensors(path)
    if not found:
        raise LoraFxError(f"{path}: holds no tensor", "is the download complete?")
    state: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(info.file for info in found.values()):
        held = pickled(file, mapped=True) if is_pickle(first_bytes(file)) else load_file(file)
        state |= {n: t for n, t in held.items() if found[n].file == file}
    return state


def _judge(module: PreTrainedModel, info: JsonView, path: Path, *, strict: bool) -> tuple[str, ...]:
    """Refuse weights that do not fit; say which are random."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise _misfit(f"{path}: tensor {name!r} is {list(found)}, expected {list(expected)}")
    problems = [*info["error_msgs"], *(info.get("conversion_errors") or {}).values()]
    if problems:
        raise _misfit(f"{path}: {one_line(problems[0], 200)}")
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    total = len(module.state_dict())
    if (strict and (missing or unexpected)) or 2 * len(missing) > total:
        what = [f"{len(n)} of its tensors {w}: {some(n, 4)}" for n, w in
                ((missing, "are missing"), (unexpected, "are unexpected")) if n]  # fmt: skip
        raise _misfit(f"{path} does not fit {type(module).__name__}: {'; '.join(what)}")
    notes = (
        (missing, f"random weights: {len(missing)} tensors are not in {path}: {some(missing, 4)}"),
        (unexpected, f"unused: {len(unexpected)} tensors of {path}: {some(unexpected, 4)}"),
    )
    return tuple(note for names, note in notes if names)


def _misfit(what: str) -> LoraFxError:
    return LoraFxError(what, "is config.json that of these weights?")


def _no_cache(module: nn.Module) -> None:
    """A cache among the outputs is no tensor; generation graphs are another matter."""
    for m in module.modules():
        config = getattr(m, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False  # type: ignore[union-attr]


def _pad(module: PreTrainedModel) -> tuple[str, ...]:
    """Classifiers of causal models refuse batches without a padding token."""
    config = module.config
    classifies = type(module).__name__.endswith("ForSequenceClassification")
    if not classifies or getattr(config, "pad_token_id", 0) is not None:
        return ()
    eos = getattr(config, "eos_token_id", None)
    config.pad_token_id = eos[0] if isinstance(eos, list) else eos or 0
    return (f"config.json has no pad_token_id: {config.pad_token_id} is taken",)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """A block without logs, bars or warnings of transformers; what matters becomes a note."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with silenced(levels={"transformers": logging.CRITICAL}):
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


# Example inputs for a transformers model, from its config and the signature of its forward.
#
# Batch 2, length 5, the same values every time. What a model's main input is, transformers says
# (`main_input_name`); how large it is, the config.


BATCH, LENGTH = 2, 5
SAMPLES = 4000
"""Length of raw audio: a quarter of a second at 16 kHz."""
FRAMES = 64
"""Length of audio features where the config fixes none."""
MOST_VALUES = 1 << 25
"""Numbers of an example input: two images of 2364 x 2364."""


def examples(module: nn.Module) -> dict[str, torch.Tensor]:
    """Keyword arguments for one call of a transformers model, on the CPU.

    Raises:
        LoraFxError: A main input whose size the config does not tell.
    """
    main: object = module.main_input_name
    config: PreTrainedConfig = module.config
    accepted = set(inspect.signature(module.forward).parameters)
    result: dict[str, torch.Tensor] = {}
    texts = main == "input_ids" or hasattr(config, "text_config")  # captions come with a text
    if texts and "input_ids" in accepted:
        result["input_ids"] = _ids(config, _vocabulary(module), seed=0)
        if "attention_mask" in accepted:
            result["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if main == "pixel_values" or ("pixel_values" in accepted and _needs_image(config)):
        result["pixel_values"] = _floats(*_image(config))
    if main in ("input_features", "input_values"):
        result[main] = _floats(*_audio(config, main))
    if main not in result:
        raise LoraFxError(
            f"no example inputs are known for {type(module).__name__} (its main input is {main!r})",
            "give file.py:FACTORY, returning (module, args, kwargs)",
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        rows = _find(getattr(config, "decoder", None), "vocab_size") or _find(config, "vocab_size")
        result["decoder_input_ids"] = _ids(config, int(rows or LENGTH), seed=1)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in result.items()}


def _configs(config: PreTrainedConfig | None) -> Iterator[PreTrainedConfig | None]:
    """A config, and after it its sub-configs, each before its own."""
    yield config
    for value in vars(config).values() if hasattr(config, "__dict__") else ():
        if hasattr(value, "model_type") and not isinstance(value, Mapping):
            yield from _configs(value)


def _find(config: PreTrainedConfig | None, name: str) -> Any:
    """A field of a config, else of the first of its sub-configs that has it."""
    values = (getattr(c, name, None) for c in _configs(config))
    return next((v for v in values if v is not None), None)


def _vocabulary(module: PreTrainedModel) -> int:
    rows: int | None = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        rows = getattr(module.get_input_embeddings(), "num_embeddings", None)
    return int(rows or _find(module.config, "vocab_size") or 256)


def _ids(config: PreTrainedConfig, rows: int, seed: int) -> torch.Tensor:
    """[2, 5] ids below `rows`, none of them special where others are left."""
    fields = (pair for c in _configs(config) for pair in vars(c).items())
    special = {
        v for k, v in fields if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)
    }
    special |= {0, 1, 2, 3}  # of the many configs that do not list theirs
    usable = torch.tensor([i for i in range(min(rows, 1000)) if i not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    return usable[torch.randint(0, len(usable), (BATCH, LENGTH), generator=generator)]


def _needs_image(config: PreTrainedConfig) -> bool:
    """True for text-image pairs (CLIP); false where images stand for tokens of the text."""
    if getattr(config, "vision_config", None) is None:
        return False
    return all(_find(config, n) is None for n in ("image_token_id", "image_token_index"))


def _image(config: PreTrainedConfig) -> tuple[int, ...]:
    size = _find(config, "image_size") or 224
    if isinstance(size, Mapping):
        size = (size.get("height", 224), size.get("width", 224))
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = int(_find(config, "num_channels") or 3)
    frames = getattr(config, "num_frames", None)  # of video models
    middle = (int(frames),) if frames else ()
    return (BATCH, *middle, channels, int(height), int(width))


def _audio(config: PreTrainedConfig, main: str) -> tuple[int, ...]:
    bins, longest = _find(config, "num_mel_bins"), _find(config, "max_source_positions")
    if main == "input_values":
        if bins and _find(config, "max_length"):  # spectrograms as images (AST)
            return (BATCH, int(_find(config, "max_length")), int(bins))
        channels = getattr(config, "audio_channels", None)  # of codecs
        return (BATCH, int(channels), SAMPLES) if channels else (BATCH, SAMPLES)
    for name in ("input_feat_per_channel", "feature_projection_input_dim"):
        if _find(config, name):
            return (BATCH, FRAMES, int(_find(config, name)))
    if bins and longest:  # whisper: the encoder halves its fixed window
        return (BATCH, int(bins), 2 * int(longest))
    return (BATCH, FRAMES, int(bins or 80))


def _floats(*shape: int) -> torch.Tensor:
    if min(shape) < 1 or math.prod(shape) > MOST_VALUES:
        sides = " x ".join(map(str, shape))
        raise ValueError(f"an input of {sides} numbers; expected 1 to {MOST_VALUES:,}")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
