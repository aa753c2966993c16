"""A decoder's forward with its key-value cache as tensors: past in, present out.

transformers' models take the cache as an object. Here a module of the same class, over the same
tensors, builds that object from tensors and takes it apart again, so that names, keys and adapters
stay those of the user's model, which is not touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError, retold
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.expert_forms import traceable_experts
from lora_fx.fx.capture.model_source import base_dtype, weightless
from lora_fx.fx.pt2.captured import FileCaptured
from lora_fx.fx.tensors import device_of
from lora_fx.inputs import LENGTH, PAST

ROWS, NOW, BEFORE = 2, 5, 3
"""The sizes of the example: rows, new tokens, tokens in the cache."""
WORKS = "causal language models of transformers whose cache keeps every token work"


class Cached:
    """The forward that replaces a decoder's; it is mixed in before the class of the model."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> dict[str, Any]:
        """The logits of the new tokens, and the cache with these tokens in it.

        Positions count the tokens that the mask has, as generate does.

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, past + length]; 0 on padding, which is on the left.
            past_key_values: {layer: {key, value}}, each [batch, heads, past, width].
        """
        from transformers import DynamicCache

        pairs = [(layer["key"], layer["value"]) for layer in past_key_values.values()]
        past, length = pairs[0][0].shape[2], input_ids.shape[1]
        torch._check(attention_mask.shape[1] == past + length)  # type: ignore[no-untyped-call]
        own: Any = super().forward  # type: ignore[misc]  # of the class that is mixed in
        named: dict[str, Any] = {_cache_name(own): DynamicCache(pairs)}
        if "position_ids" in inspect.signature(own).parameters:
            counted = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            named["position_ids"] = counted.narrow(1, past, length)
        out = own(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **named)
        layers = _cache_of(out).layers
        present = {str(i): {"key": x.keys, "value": x.values} for i, x in enumerate(layers)}
        return {"logits": out.logits, "present": present}


def decoder(model: Any, *, repeat: bool = True) -> Captured:
    """The capture of a model with its cache; that of a model without is taken as its source.

    Raises:
        LoraFxError: The model is no decoder of transformers, or its cache is of another kind.
    """
    if isinstance(model, FileCaptured):
        raise LoraFxError(
            f"{model.path} holds a traced graph without a cache",
            "export from the model's folder or code",
        )
    notes: list[str] = []
    if isinstance(model, Captured):
        if isinstance(model.model, Cached):
            return model
        notes, repeat, model = model.notes, model.repeat, model.model
    layers = _layers(model)
    generator = torch.Generator().manual_seed(0)
    rows = int(model.config.get_text_config().vocab_size)
    dtype, device = base_dtype(model), _device(model)
    named: dict[str, Any] = {
        "input_ids": torch.randint(0, rows, (ROWS, NOW), generator=generator).to(device),
        "attention_mask": torch.ones(ROWS, BEFORE + NOW, dtype=torch.int64, device=device),
        "past_key_values": {},
    }
    dynamic: dict[str, Any] = {
        "input_ids": {1: LENGTH},
        "attention_mask": {1: f"{PAST} + {LENGTH}"},
    }
    for i, (heads, *widths) in enumerate(layers):
        pair = zip(("key", "value"), widths, strict=True)
        named["past_key_values"][str(i)] = {
            k: torch.randn(ROWS, heads, BEFORE, width, generator=generator).to(device, dtype)
            for k, width in pair
        }
        dynamic |= {f"past_key_values.{i}.{k}": {2: PAST} for k in ("key", "value")}
    captured = Captured(with_cache(model), (), named, dynamic, repeat=repeat)
    captured.notes += [n for n in notes if n not in captured.notes]
    captured.traced(False, captured.named)
    return captured


def with_cache(model: nn.Module) -> nn.Module:
    """A module of the same class name over the same modules and tensors, with Cached's forward."""
    kind = type(type(model).__name__, (Cached, type(model)), {"__module__": __name__})
    new: nn.Module = object.__new__(kind)
    new.__dict__.update(model.__dict__)
    return new


def _layers(model: Any) -> list[tuple[int, int, int]]:
    """Heads, width of keys and width of values of every layer, from a run without weights."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise LoraFxError(f"{name} is no decoder of transformers", WORKS)
    if getattr(config, "is_encoder_decoder", False):
        raise LoraFxError(f"{name} has an encoder, whose cache is of another kind", WORKS)
    accepted = inspect.signature(model.forward).parameters
    if not {"input_ids", "attention_mask", "use_cache"} <= set(accepted):
        raise LoraFxError(f"{name} takes no cache, so it is no decoder", WORKS)
    if "forward" in model.__dict__:
        raise LoraFxError(
            f"the forward of this {name} was replaced on the object",
            "the forward of its class is what gets a cache: build the model anew",
        )
    copied, mode = weightless(model)
    copied.eval()
    with retold(f"{name} does not run with a cache of keys and values", WORKS, most=160):
        from transformers import DynamicCache

        # made without the config, no layer of it drops what a sliding window has passed
        given = {_cache_name(model.forward): DynamicCache()}
        with mode, traceable_experts(copied, portable=True), torch.no_grad():
            ids = torch.zeros(ROWS, NOW, dtype=torch.int64, device=_device(model))
            out = copied(input_ids=ids, use_cache=True, **given)
    cache = _cache_of(out)
    kinds = {type(x).__name__ for x in getattr(cache, "layers", ())}
    if type(cache).__name__ != "DynamicCache" or kinds != {"DynamicLayer"}:
        found = ", ".join(sorted(kinds)) or type(cache).__name__
        raise LoraFxError(f"{name} returns another cache than all its tokens' ({found})", WORKS)
    if not hasattr(out, "logits"):
        raise LoraFxError(f"{name} has no logits, only the decoder's body", WORKS)
    return [(x.keys.shape[1], x.keys.shape[3], x.values.shape[3]) for x in cache.layers]


def _device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs; captures of models without weights run on the CPU."""
    device = device_of(model)
    return torch.device("cpu") if device.type == "meta" else device


def _cache_name(forward: Any) -> str:
    """The argument of a forward that takes the cache object."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _cache_of(out: Any) -> Any:
    """The cache object of a model's output; the field has had two names."""
    return getattr(out, "cache", None) or getattr(out, "past_key_values", None)
