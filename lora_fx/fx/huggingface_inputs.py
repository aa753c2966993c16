"""Example inputs for a transformers model, from its config and the signature of its forward.

Batch 2, length 5, the same values every time. What a model's main input is, transformers says
(`main_input_name`); how large it is, the config.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError

BATCH, LENGTH = 2, 5
SAMPLES = 4000
"""Length of raw audio: a quarter of a second at 16 kHz."""
FRAMES = 64
"""Length of audio features where the config fixes none."""


def examples(module: nn.Module) -> dict[str, torch.Tensor]:
    """Keyword arguments for one call of a transformers model, on the CPU.

    Raises:
        LoraFxError: A main input whose size the config does not tell.
    """
    main: Any = module.main_input_name
    config: Any = module.config
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


def _subconfigs(config: Any) -> list[Any]:
    values = vars(config).values() if hasattr(config, "__dict__") else ()
    return [v for v in values if hasattr(v, "model_type") and not isinstance(v, Mapping)]


def _find(config: Any, name: str) -> Any:
    """A field of a config, else of the first of its sub-configs that has it."""
    if config is None:
        return None
    value = getattr(config, name, None)
    inner = (_find(c, name) for c in _subconfigs(config))
    return value if value is not None else next((v for v in inner if v is not None), None)


def _vocabulary(module: Any) -> int:
    try:
        rows = getattr(module.get_input_embeddings(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):
        rows = None
    return int(rows or _find(module.config, "vocab_size") or 256)


def _ids(config: Any, rows: int, seed: int) -> torch.Tensor:
    """[2, 5] ids below `rows`, none of them special where others are left."""
    special = {v for k, v in _fields(config) if k.endswith(("_token_id", "_token_index"))}
    special |= {0, 1, 2, 3}  # of the many configs that do not list theirs
    usable = torch.tensor([i for i in range(min(rows, 1000)) if i not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    return usable[torch.randint(0, len(usable), (BATCH, LENGTH), generator=generator)]


def _fields(config: Any) -> list[tuple[str, Any]]:
    mine = [(k, v) for k, v in vars(config).items() if isinstance(v, int)]
    return mine + [pair for c in _subconfigs(config) for pair in _fields(c)]


def _needs_image(config: Any) -> bool:
    """True for text-image pairs (CLIP); false where images stand for tokens of the text."""
    if getattr(config, "vision_config", None) is None:
        return False
    return all(_find(config, n) is None for n in ("image_token_id", "image_token_index"))


def _image(config: Any) -> tuple[int, ...]:
    size = _find(config, "image_size") or 224
    if isinstance(size, Mapping):
        size = (size.get("height", 224), size.get("width", 224))
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = int(_find(config, "num_channels") or 3)
    frames = getattr(config, "num_frames", None)  # of video models
    middle = (int(frames),) if frames else ()
    return (BATCH, *middle, channels, int(height), int(width))


def _audio(config: Any, main: str) -> tuple[int, ...]:
    bins, longest = _find(config, "num_mel_bins"), _find(config, "max_source_positions")
    if main == "input_values":
        if bins and _find(config, "max_length"):  # spectrograms as images (AST)
            return (BATCH, int(_find(config, "max_length")), int(bins))
        channels = getattr(config, "audio_channels", None)  # of codecs
        return (BATCH, int(channels), SAMPLES) if channels else (BATCH, SAMPLES)
    for field in ("input_feat_per_channel", "feature_projection_input_dim"):
        if _find(config, field):
            return (BATCH, FRAMES, int(_find(config, field)))
    if bins and longest:  # whisper: the encoder halves its fixed window
        return (BATCH, int(bins), 2 * int(longest))
    return (BATCH, FRAMES, int(bins or 80))


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
