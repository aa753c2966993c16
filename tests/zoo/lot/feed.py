"""Example inputs by rule: from a forward's signature, the main input's name and the config."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .shrink import subconfig

BATCH = 2
LENGTH = 7


def floats(*shape: int) -> Tensor:
    """Standard normal numbers, of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def whole(high: int, *shape: int, low: int = 3) -> Tensor:
    """Whole numbers below `high`."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(min(low, high - 1), high, shape, generator=generator)


def of_transformers(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Arguments by name, the likeliest first."""
    fields = inspect.signature(model.forward).parameters
    needed = [n for n, p in fields.items() if p.default is p.empty and p.kind == 1]
    main = getattr(model, "main_input_name", "input_ids")
    made = _makers(model, config)
    usual = ["input_ids", "attention_mask", "bbox", "pixel_values", "input_features"]
    if getattr(config, "is_encoder_decoder", False):
        usual += ["decoder_input_ids"]
    names: list[list[str]] = []
    both = [n for n in dict.fromkeys([*needed, main, *usual]) if n in fields]
    for chosen in (both, [n for n in both if n in (*needed, main, "decoder_input_ids")]):
        text = [n for n in chosen if n != "attention_mask" or "input_ids" in chosen]
        for one in (text, [n for n in text if n != "attention_mask"]):
            if one not in names and all(n in made for n in one):
                names.append(one)
    if "input_ids" in fields and ["input_ids"] not in names:
        names.append(["input_ids"])
    for chosen in names:
        ways = [[(n, make) for make in made[n]] for n in chosen]
        for combination in itertools.islice(itertools.product(*ways), 8):
            call: dict[str, Any] = {}
            for name, make in combination:
                call[name] = make()
            yield _with_image_tokens(model, config, call)


def _makers(model: nn.Module, config: Any) -> dict[str, list[Callable[[], Any]]]:
    text = config.get_text_config()
    vocab = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 100
    encoder = getattr(config, "vocab_size", None) or vocab
    special = [v for k, v in vars(config).items() if k.endswith(("token_id", "token_index"))]
    top = min([encoder, *(v for v in special if isinstance(v, int) and v > 64)])
    vision = subconfig(config, "vision_config", "backbone_config")
    image = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 64
    if isinstance(image, dict):
        image = image.get("height", image.get("shortest_edge", 64))
    high, wide = (image, image) if isinstance(image, int) else tuple(image)[-2:]
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    frames = getattr(vision, "num_frames", None) or getattr(config, "num_frames", None)
    audio = subconfig(config, "audio_config", "encoder_config")
    mel = next(
        (
            getattr(audio, n)
            for n in ("num_mel_bins", "feature_size", "input_dim", "input_feat_per_channel")
            if isinstance(getattr(audio, n, None), int)
        ),
        80,
    )
    places = getattr(audio, "max_source_positions", None) or getattr(audio, "max_length", None)
    time = 2 * places if getattr(audio, "max_source_positions", None) else places or 64

    def picture(h: int, w: int) -> Callable[[], Tensor]:
        if frames and not hasattr(config, "text_config"):
            return lambda: floats(BATCH, frames, channels, h, w)
        return lambda: floats(BATCH, channels, h, w)

    def tokens(n: int) -> Callable[[], Tensor]:
        return lambda: whole(min(n, top) if n >= top > 8 else n, BATCH, LENGTH)

    pictures = [picture(high, wide)] + [picture(n, n) for n in (64, 224) if n != high]
    return {
        "input_ids": [tokens(encoder)],
        "attention_mask": [lambda: torch.ones(BATCH, LENGTH, dtype=torch.long)],
        "decoder_input_ids": [tokens(vocab)],
        "bbox": [lambda: whole(1, BATCH, LENGTH, 4, low=0) + torch.tensor([1, 2, 30, 40])],
        "pixel_values": pictures,
        "pixel_values_videos": [lambda: floats(BATCH, frames or 4, channels, high, wide)],
        "past_values": [
            lambda: floats(BATCH, config.context_length, getattr(config, "num_input_channels", 1))
        ],
        "input_features": [
            lambda: floats(BATCH, mel, time), lambda: floats(BATCH, time, mel),
            lambda: floats(BATCH, time, 2 * mel),
        ],
        "input_values": [
            lambda: floats(BATCH, 4000), lambda: floats(BATCH, 1, 4000),
            lambda: floats(BATCH, time, mel), lambda: floats(BATCH, 1, time, mel),
        ],
    }  # fmt: skip


def _with_image_tokens(model: nn.Module, config: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Where an image stands among tokens: as many of its token as it has features."""
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if token is None or "input_ids" not in call or "pixel_values" not in call:
        return call
    try:
        with torch.no_grad():
            found = model.get_image_features(call["pixel_values"])
    except Exception:  # other arguments are needed, which no rule makes
        return call
    found = getattr(found, "pooler_output", found)
    rows = found[0] if isinstance(found, (list, tuple)) else found
    count = rows.shape[-2]
    images = torch.full((BATCH, count), token)
    ids = torch.cat([call["input_ids"][:, :3], images, call["input_ids"][:, 3:]], 1)
    return {**call, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def of_vision(model: nn.Module, sides: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Positional arguments of an image model, or of one of videos, lists or pairs of images."""
    first, *more = inspect.signature(model.forward).parameters
    for side in sides:
        if first == "images":
            yield ([floats(3, side, side), floats(3, side, side)],)
        elif more and more[0].startswith("image"):
            yield floats(1, 3, side, side), floats(1, 3, side, side).flip(3)
        elif "video" in type(model).__module__:
            yield (floats(BATCH, 3, 16 if side > 112 else 8, side, side),)
        else:
            yield (floats(BATCH, 3, side, side),)
