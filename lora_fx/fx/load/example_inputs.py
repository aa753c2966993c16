"""Example inputs for a transformers model, from its config and the signature of its forward.

Batch 2, length 5, the same values every time. What a model's main input is, transformers says
(`main_input_name`); how large it is, the config.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
        rows = config_field(getattr(config, "decoder", None), "vocab_size") or config_field(
            config, "vocab_size"
        )
        result["decoder_input_ids"] = _ids(config, int(rows or LENGTH), seed=1)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in result.items()}


def nested_configs(config: PreTrainedConfig | None) -> Iterator[PreTrainedConfig | None]:
    """A config, and after it its sub-configs, each before its own."""
    yield config
    for value in vars(config).values() if hasattr(config, "__dict__") else ():
        if hasattr(value, "model_type") and not isinstance(value, Mapping):
            yield from nested_configs(value)


def config_field(config: PreTrainedConfig | None, name: str) -> Any:
    """A field of a config, else of the first of its sub-configs that has it."""
    values = (getattr(c, name, None) for c in nested_configs(config))
    return next((v for v in values if v is not None), None)


def _vocabulary(module: PreTrainedModel) -> int:
    rows: int | None = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        rows = getattr(module.get_input_embeddings(), "num_embeddings", None)
    return int(rows or config_field(module.config, "vocab_size") or 256)


def _ids(config: PreTrainedConfig, rows: int, seed: int) -> torch.Tensor:
    """[2, 5] ids below `rows`, none of them special where others are left."""
    fields = (pair for c in nested_configs(config) for pair in vars(c).items())
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
    return all(config_field(config, n) is None for n in ("image_token_id", "image_token_index"))


def _image(config: PreTrainedConfig) -> tuple[int, ...]:
    size = config_field(config, "image_size") or 224
    if isinstance(size, Mapping):
        size = (size.get("height", 224), size.get("width", 224))
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = int(config_field(config, "num_channels") or 3)
    frames = getattr(config, "num_frames", None)  # of video models
    middle = (int(frames),) if frames else ()
    return (BATCH, *middle, channels, int(height), int(width))


def _audio(config: PreTrainedConfig, main: str) -> tuple[int, ...]:
    bins, longest = (
        config_field(config, "num_mel_bins"),
        config_field(config, "max_source_positions"),
    )
    if main == "input_values":
        if bins and config_field(config, "max_length"):  # spectrograms as images (AST)
            return (BATCH, int(config_field(config, "max_length")), int(bins))
        channels = getattr(config, "audio_channels", None)  # of codecs
        return (BATCH, int(channels), SAMPLES) if channels else (BATCH, SAMPLES)
    for name in ("input_feat_per_channel", "feature_projection_input_dim"):
        if config_field(config, name):
            return (BATCH, FRAMES, int(config_field(config, name)))
    if bins and longest:  # whisper: the encoder halves its fixed window
        return (BATCH, int(bins), 2 * int(longest))
    return (BATCH, FRAMES, int(bins or 80))


def _floats(*shape: int) -> torch.Tensor:
    if min(shape) < 1 or math.prod(shape) > MOST_VALUES:
        sides = " x ".join(map(str, shape))
        raise ValueError(f"an input of {sides} numbers; expected 1 to {MOST_VALUES:,}")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
