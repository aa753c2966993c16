"""An encoder-decoder in two parts: its encoder, and a decoder's step with the cache as tensors.

The encoder runs once for an input and gives the keys and values of the decoder's cross-attention,
so that a step computes neither again. Both are the forward of a module of the same class over the
same tensors, as in decoder.py: names, keys and adapters stay those of the user's model. The weights
that make the keys and values of the cross-attention belong to the encoder's part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
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
from lora_fx.fx.capture.expert_forms import traceable_experts
from lora_fx.fx.capture.model_source import base_dtype, weightless
from lora_fx.fx.symbolic_sizes import equal_sizes_shared
from lora_fx.inputs import LENGTH, PAST

FROM = "encoder_length"
"""The name of the number of the encoder's states."""
READ = 6
"""The number of tokens that the encoder reads in the example, and of states in the step's cache."""
WORKS = (
    "use an encoder-decoder of transformers that reads tokens, or Whisper; or export without "
    "--cache"
)


class EncoderPart(OtherForward):
    """The forward of an encoder; a subclass mixes it in before the model's class."""

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the encoder's states, and the keys and values of the cross-attention.

        Args:
            input_features: [batch, bins, frames], for Whisper.
            input_ids: [batch, encoder_length], for a model that reads tokens.
            attention_mask: [batch, encoder_length], with input_ids; 0 on padding.
        """
        from transformers import DynamicCache, EncoderDecoderCache

        forward: Any = super().forward  # type: ignore[misc]  # of the class that is mixed in
        named = _given(
            input_features=input_features, input_ids=input_ids, attention_mask=attention_mask
        )
        source = next(iter(named.values()))
        # the model fills the cache in a step of one token; the rest of that step is read by nothing
        first = torch.zeros(source.shape[0], 1, dtype=torch.int64, device=source.device)
        named[cache_name(forward)] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        out = forward(**named, decoder_input_ids=first, use_cache=True)
        layers = cache_of(out).cross_attention_cache.layers
        present = {
            str(i): {"encoder": {"key": layer.keys, "value": layer.values}}
            for i, layer in enumerate(layers)
        }
        return {"last_hidden_state": out.encoder_last_hidden_state, "present": present}


class DecoderStep(OtherForward):
    """The forward of a decoder's step; a subclass mixes it in before the model's class."""

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]],
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the logits of the new tokens, and the cache with these tokens appended.

        Args:
            input_ids: [batch, length], the decoder's new tokens.
            past_key_values: {layer: {decoder, encoder: {key, value}}}; the decoder's are
                [batch, heads, past, width], the encoder's [batch, heads, encoder_length, width].
            encoder_attention_mask: [batch, encoder_length]; 0 on the encoder's padding.
        """
        from transformers import DynamicCache, EncoderDecoderCache

        own = [_pair(layer["decoder"]) for layer in past_key_values.values()]
        crossed = [_pair(layer["encoder"]) for layer in past_key_values.values()]
        self._check_sizes(input_ids.shape[0], own, crossed)
        cache = EncoderDecoderCache(filled_cache(own), DynamicCache())
        # given to its class, it would ask whether each length is above 0
        cache.cross_attention_cache = filled_cache(crossed)
        cache.is_updated = dict.fromkeys(range(len(crossed)), True)

        forward: Any = super().forward  # type: ignore[misc]  # of the class that is mixed in
        config: Any = self.config  # type: ignore[attr-defined]  # likewise
        keys = crossed[0][0]
        # only the sizes of the states are read: their keys and values are in the cache
        states = keys.new_zeros(keys.shape[0], keys.shape[2], config.hidden_size)
        named = _given(attention_mask=encoder_attention_mask)
        named[cache_name(forward)] = cache
        out = forward(
            encoder_outputs=(states,), decoder_input_ids=input_ids, use_cache=True, **named
        )
        present = {
            str(i): {"decoder": {"key": layer.keys, "value": layer.values}}
            for i, layer in enumerate(cache_of(out).self_attention_cache.layers)
        }
        return {"logits": out.logits, "present": present}

    @staticmethod
    def _check_sizes(rows: int, own: Sequence[_Pair], crossed: Sequence[_Pair]) -> None:
        """Tell torch.export, before the first layer, which sizes are equal in all of them."""
        check: Any = torch._check
        for pairs in (own, crossed):
            length = pairs[0][0].shape[2]
            for pair in pairs:
                for states in pair:
                    check(states.shape[0] == rows)
                    check(states.shape[2] == length)


_Pair = tuple[torch.Tensor, torch.Tensor]


def _pair(layer: Mapping[str, torch.Tensor]) -> _Pair:
    return layer["key"], layer["value"]


def _given(**tensors: torch.Tensor | None) -> dict[str, Any]:
    """Return the arguments that are given."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def is_encoder_decoder(model: object) -> bool:
    """Whether a model of transformers says that it has an encoder and a decoder."""
    return isinstance(model, nn.Module) and bool(
        getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    )


def decoder_step(
    model: Any, *, repeat: bool = True, check: Callable[[Any], object] | None = None
) -> Captured:
    """Capture a step of an encoder-decoder's decoder.

    Args:
        model: The model.
        repeat: Trace equal layers once.
        check: Called with the model's config before it is captured; it may raise.

    Raises:
        LoraFxError: The encoder reads something else than tokens or Whisper's features, or the
            cache does not keep every token.
    """
    example = _encoder_example(model)
    layers = _layers(model, example)
    if check is not None:
        check(model.config)
    generator = torch.Generator().manual_seed(0)
    dtype, device = base_dtype(model), device_of_inputs(model)

    def drawn(heads: int, length: int, width: int) -> torch.Tensor:
        return torch.randn(ROWS, heads, length, width, generator=generator).to(device, dtype)

    past: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    dynamic: dict[str, Any] = {"input_ids": {1: LENGTH}}
    for i, shapes in enumerate(layers):
        past[str(i)] = {}
        for part, length, symbol in (("decoder", BEFORE, PAST), ("encoder", READ, FROM)):
            heads, key_width, value_width = shapes[part]
            keys, values = drawn(heads, length, key_width), drawn(heads, length, value_width)
            past[str(i)][part] = {"key": keys, "value": values}
            for kind in ("key", "value"):
                dynamic[f"past_key_values.{i}.{part}.{kind}"] = {2: symbol}

    named: dict[str, Any] = {"input_ids": _tokens(model, NOW), "past_key_values": past}
    if "attention_mask" in example:
        named["encoder_attention_mask"] = _ones(model, READ)
        dynamic["encoder_attention_mask"] = {1: FROM}
    return _captured(with_forward(DecoderStep, model), named, dynamic, repeat=repeat)


def encoder_of(step: Captured) -> Captured:
    """Return the capture of the encoder of the model that a step was captured of."""
    example = _encoder_example(step.model)
    if "input_features" in example:
        dynamic: dict[str, Any] = {}
        static = ["input_features:1", "input_features:2"]
    else:
        dynamic = {name: {1: FROM} for name in example}
        static = []
    part = with_forward(EncoderPart, step.model)
    return _captured(part, example, dynamic, static, repeat=step.repeat)


def read_by(captured: Captured) -> set[str]:
    """Return the names of the tensors that a capture's graph reads."""
    graph = captured.traced(False, captured.named).graph
    return {str(node.target) for node in graph.find_nodes(op="get_attr")}


def _captured(
    model: nn.Module,
    named: Mapping[str, Any],
    dynamic: Mapping[str, Any],
    static: Sequence[str] = (),
    *,
    repeat: bool,
) -> Captured:
    """Capture a part in eval mode, with sizes of one name known to be equal."""
    captured = Captured(model, (), named, dynamic, static, repeat=repeat)
    with equal_sizes_shared():
        captured.traced(False, captured.named)
    return captured


def _encoder_example(model: Any) -> dict[str, torch.Tensor]:
    """Return the encoder's example inputs by name.

    Raises:
        LoraFxError: A model whose encoder reads something else.
    """
    reads = getattr(model, "main_input_name", "input_ids")
    if reads == "input_ids":
        return {"input_ids": _tokens(model, READ), "attention_mask": _ones(model, READ)}

    encoder = model.get_encoder()
    is_whisper = reads == "input_features" and hasattr(encoder, "conv2")
    if not is_whisper:
        name = type(model).__name__
        raise LoraFxError(
            f"{name}: its encoder reads {reads}, which --cache does not know the sizes of", WORKS
        )
    config = model.config
    # other numbers of frames raise in the model
    frames = config.max_source_positions * encoder.conv1.stride[0] * encoder.conv2.stride[0]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(ROWS, config.num_mel_bins, frames, generator=generator)
    return {"input_features": features.to(device_of_inputs(model), base_dtype(model))}


def _tokens(model: Any, length: int) -> torch.Tensor:
    return tokens(model, length, torch.Generator().manual_seed(0))


def _ones(model: Any, length: int) -> torch.Tensor:
    return torch.ones(ROWS, length, dtype=torch.int64, device=device_of_inputs(model))


def _layers(
    model: Any, example: Mapping[str, torch.Tensor]
) -> list[dict[str, tuple[int, int, int]]]:
    """Return heads, key width and value width of each layer's two parts, without weights."""
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    if not {"decoder_input_ids", "encoder_outputs", "use_cache"} <= set(parameters):
        raise LoraFxError(f"{name} takes no cache, so it has no decoder to step", WORKS)
    check_forward(model)
    copied, mode = weightless(model)
    copied.eval()
    with retold(f"{name} does not run with a cache of keys and values", WORKS, most=160):
        from transformers import DynamicCache, EncoderDecoderCache

        # made without the config, no layer of it drops what a sliding window has passed
        empty = EncoderDecoderCache(DynamicCache(), DynamicCache())
        named: dict[str, Any] = {**example, "decoder_input_ids": _tokens(model, NOW)}
        named[cache_name(model.forward)] = empty
        with mode, traceable_experts(copied, portable=True), torch.no_grad():
            out = copied(**named, use_cache=True)
    if not hasattr(out, "logits"):
        raise LoraFxError(f"{name} returns no logits: it is a body without a head", WORKS)
    cache = cache_of(out)
    parts: dict[str, Any] = {
        "decoder": getattr(cache, "self_attention_cache", None),
        "encoder": getattr(cache, "cross_attention_cache", None),
    }
    layers: dict[str, list[tuple[int, int, int]]] = {}
    for part, of_part in parts.items():
        kinds = {type(layer).__name__ for layer in getattr(of_part, "layers", ())}
        if kinds != {"DynamicLayer"}:
            returned = ", ".join(sorted(kinds)) or type(cache).__name__
            raise LoraFxError(
                f"{name} returns a cache that does not keep every token ({returned})", WORKS
            )
        layers[part] = [
            (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
            for layer in of_part.layers
        ]
    return [
        {"decoder": own, "encoder": crossed}
        for own, crossed in zip(layers["decoder"], layers["encoder"], strict=True)
    ]
