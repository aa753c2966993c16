"""A decoder's forward with its key-value cache as tensors: past in, present out.

transformers' models take the cache as an object. Here a module of the same class, over the same
tensors, builds that object from tensors and takes it apart again, so that names, keys and adapters
stay those of the user's model, which is not touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError, retold
from lora_fx.fx.capture.cached_model import (
    BEFORE,
    NOW,
    ROWS,
    OtherForward,
    cache_name,
    cache_of,
    check_forward,
    device_of_inputs,
    filled_cache,
    tokens,
    with_forward,
)
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.encoder_decoder import decoder_step, is_encoder_decoder
from lora_fx.fx.capture.expert_forms import traceable_experts
from lora_fx.fx.capture.model_source import base_dtype, weightless
from lora_fx.fx.pt2.captured import FileCaptured
from lora_fx.fx.symbolic_sizes import equal_sizes_shared
from lora_fx.inputs import LENGTH, PAST

WORKS = "use a causal language model of transformers whose cache keeps every token"


class Cached(OtherForward):
    """The forward of a decoder with a cache; a subclass mixes it in before the model's class."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> dict[str, Any]:
        """Return the logits of the new tokens, and the cache with these tokens appended.

        Positions count the tokens that the mask has, as generate does.

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, past + length]; 0 on padding, which is on the left.
            past_key_values: {layer: {key, value}}, each [batch, heads, past, width].
        """
        pairs = [(layer["key"], layer["value"]) for layer in past_key_values.values()]
        rows, length = input_ids.shape
        past = pairs[0][0].shape[2]
        check: Any = torch._check
        check(attention_mask.shape[1] == past + length)
        for past_states in chain.from_iterable(pairs):
            # known only in its layer, the sizes would be others than in the layer before
            check(past_states.shape[0] == rows)
            check(past_states.shape[2] == past)
        forward: Any = super().forward  # type: ignore[misc]  # of the class that is mixed in
        named: dict[str, Any] = {cache_name(forward): filled_cache(pairs)}
        if "position_ids" in inspect.signature(forward).parameters:
            positions = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            named["position_ids"] = positions.narrow(1, past, length)
        out = forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **named)
        present = {
            str(i): {"key": layer.keys, "value": layer.values}
            for i, layer in enumerate(cache_of(out).layers)
        }
        return {"logits": out.logits, "present": present}


def decoder(
    model: Any, *, repeat: bool = True, check: Callable[[Any], object] | None = None
) -> Captured:
    """Capture a model with its cache; `model` may be a capture without a cache.

    Args:
        model: A decoder of transformers, or its capture.
        repeat: Trace equal layers once.
        check: Called with the model's config before it is captured; it may raise.

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
        if isinstance(model.model, OtherForward):
            return model
        notes = model.notes
        repeat = model.repeat
        model = model.model
    if is_encoder_decoder(model):
        captured = decoder_step(model, repeat=repeat, check=check)
        captured.notes += [note for note in notes if note not in captured.notes]
        return captured
    layers = _layers(model)
    if check is not None:
        check(model.config)
    named = _example_call(model, layers)
    dynamic: dict[str, Any] = {
        "input_ids": {1: LENGTH},
        "attention_mask": {1: f"{PAST} + {LENGTH}"},
    }
    for i in range(len(layers)):
        dynamic[f"past_key_values.{i}.key"] = {2: PAST}
        dynamic[f"past_key_values.{i}.value"] = {2: PAST}
    captured = Captured(with_forward(Cached, model), (), named, dynamic, repeat=repeat)
    captured.notes += [note for note in notes if note not in captured.notes]
    with equal_sizes_shared():
        captured.traced(False, captured.named)
    return captured


def _example_call(model: Any, layers: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Draw arguments for Cached's forward, with a fixed seed.

    Args:
        model: The decoder.
        layers: Heads, width of keys and width of values of every layer.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = base_dtype(model)
    device = device_of_inputs(model)
    input_ids = tokens(model, NOW, generator)
    past: dict[str, dict[str, torch.Tensor]] = {}
    for i, (heads, key_width, value_width) in enumerate(layers):
        key = torch.randn(ROWS, heads, BEFORE, key_width, generator=generator)
        value = torch.randn(ROWS, heads, BEFORE, value_width, generator=generator)
        past[str(i)] = {"key": key.to(device, dtype), "value": value.to(device, dtype)}
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones(ROWS, BEFORE + NOW, dtype=torch.int64, device=device),
        "past_key_values": past,
    }


def _layers(model: Any) -> list[tuple[int, int, int]]:
    """Return heads, key width and value width of each layer, from a run without weights."""
    _check_decoder(model)
    name = type(model).__name__
    copied, mode = weightless(model)
    copied.eval()
    with retold(f"{name} does not run with a cache of keys and values", WORKS, most=160):
        from transformers import DynamicCache

        # made without the config, no layer of it drops what a sliding window has passed
        empty_cache = {cache_name(model.forward): DynamicCache()}
        with mode, traceable_experts(copied, portable=True), torch.no_grad():
            ids = torch.zeros(ROWS, NOW, dtype=torch.int64, device=device_of_inputs(model))
            out = copied(input_ids=ids, use_cache=True, **empty_cache)
    cache = cache_of(out)
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if type(cache).__name__ != "DynamicCache" or kinds != {"DynamicLayer"}:
        returned = ", ".join(sorted(kinds)) or type(cache).__name__
        raise LoraFxError(
            f"{name} returns a cache that does not keep every token ({returned})", WORKS
        )
    if not hasattr(out, "logits"):
        raise LoraFxError(f"{name} returns no logits: it is a decoder's body without a head", WORKS)
    layers: list[tuple[int, int, int]] = []
    for layer in cache.layers:
        layers.append((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]))
    return layers


def _check_decoder(model: Any) -> None:
    """Raise for a model that is not a decoder of transformers with its class's forward."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise LoraFxError(f"{name} is not a decoder of transformers", WORKS)
    parameters = inspect.signature(model.forward).parameters
    if not {"input_ids", "attention_mask", "use_cache"} <= set(parameters):
        raise LoraFxError(f"{name} takes no cache, so it is not a decoder", WORKS)
    check_forward(model)
