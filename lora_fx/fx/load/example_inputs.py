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

BATCH = 2
LENGTH = 5
"""Tokens of a text."""
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
    inputs: dict[str, torch.Tensor] = {}
    takes_text = main == "input_ids" or hasattr(config, "text_config")  # captions come with a text
    if takes_text and "input_ids" in accepted:
        inputs["input_ids"] = _ids(config, _vocabulary(module), seed=0)
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if main == "pixel_values" or ("pixel_values" in accepted and _needs_image(config)):
        inputs["pixel_values"] = _floats(*_image(config))
    if main in ("input_features", "input_values"):
        inputs[main] = _floats(*_audio(config, main))
    if main not in inputs:
        raise LoraFxError(
            f"no example inputs are known for {type(module).__name__} (its main input is {main!r})",
            "give file.py:FACTORY, which returns (module, args, kwargs)",
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _ids(config, _decoder_vocabulary(config), seed=1)

    dtype = _floating_dtype(module)
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(dtype)
    return inputs


def _floating_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first floating parameter; float32 where it has none."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def nested_configs(config: PreTrainedConfig | None) -> Iterator[PreTrainedConfig | None]:
    """A config, and after it its sub-configs, each before its own."""
    yield config
    if not hasattr(config, "__dict__"):
        return
    for value in vars(config).values():
        if hasattr(value, "model_type") and not isinstance(value, Mapping):
            yield from nested_configs(value)


def config_field(config: PreTrainedConfig | None, name: str) -> Any:
    """A field of a config, else of the first of its sub-configs that has it; None if none has."""
    for inner in nested_configs(config):
        value = getattr(inner, name, None)
        if value is not None:
            return value
    return None


def _vocabulary(module: PreTrainedModel) -> int:
    """The number of ids that a model takes: the rows of its embedding, else from its config."""
    rows: int | None = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        rows = getattr(module.get_input_embeddings(), "num_embeddings", None)
    return int(rows or config_field(module.config, "vocab_size") or 256)


def _decoder_vocabulary(config: PreTrainedConfig) -> int:
    decoder = getattr(config, "decoder", None)
    rows = config_field(decoder, "vocab_size") or config_field(config, "vocab_size")
    return int(rows or LENGTH)


def _ids(config: PreTrainedConfig, rows: int, seed: int) -> torch.Tensor:
    """[2, 5] ids below `rows`, none of them special where others are left."""
    special = {0, 1, 2, 3}  # of the many configs that do not list theirs
    for inner in nested_configs(config):
        for name, value in vars(inner).items():
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
                special.add(value)
    usable = [token for token in range(min(rows, 1000)) if token not in special]
    ids = torch.tensor(usable or [0])
    generator = torch.Generator().manual_seed(seed)
    return ids[torch.randint(0, len(ids), (BATCH, LENGTH), generator=generator)]


def _needs_image(config: PreTrainedConfig) -> bool:
    """True for text-image pairs (CLIP); false if images replace tokens of the text."""
    if getattr(config, "vision_config", None) is None:
        return False
    names = ("image_token_id", "image_token_index")
    return all(config_field(config, name) is None for name in names)


def _image(config: PreTrainedConfig) -> tuple[int, ...]:
    """[batch, channels, height, width] of images, [batch, frames, …] of videos."""
    size = config_field(config, "image_size") or 224
    if isinstance(size, Mapping):
        size = (size.get("height", 224), size.get("width", 224))
    elif isinstance(size, int):
        size = (size, size)
    height, width = tuple(size)[-2:]
    channels = int(config_field(config, "num_channels") or 3)
    frames = getattr(config, "num_frames", None)  # of video models
    if frames:
        return (BATCH, int(frames), channels, int(height), int(width))
    return (BATCH, channels, int(height), int(width))


def _audio(config: PreTrainedConfig, main: str) -> tuple[int, ...]:
    """The shape of raw audio (`input_values`) or of its features (`input_features`)."""
    bins = config_field(config, "num_mel_bins")
    if main == "input_values":
        length = config_field(config, "max_length")
        if bins and length:  # spectrograms as images (AST)
            return (BATCH, int(length), int(bins))
        channels = getattr(config, "audio_channels", None)  # of codecs
        if channels:
            return (BATCH, int(channels), SAMPLES)
        return (BATCH, SAMPLES)
    for name in ("input_feat_per_channel", "feature_projection_input_dim"):
        width = config_field(config, name)
        if width:
            return (BATCH, FRAMES, int(width))
    longest = config_field(config, "max_source_positions")
    if bins and longest:  # whisper: the encoder halves its fixed window
        return (BATCH, int(bins), 2 * int(longest))
    return (BATCH, FRAMES, int(bins or 80))


def _floats(*shape: int) -> torch.Tensor:
    """Noise of a shape, the same every time.

    Raises:
        ValueError: It would have no numbers, or more than MOST_VALUES.
    """
    if min(shape) < 1 or math.prod(shape) > MOST_VALUES:
        sides = " x ".join(map(str, shape))
        raise ValueError(f"an input of {sides} numbers; expected 1 to {MOST_VALUES:,}")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
