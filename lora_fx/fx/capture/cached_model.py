"""What captures of models with a key-value cache share: the cache of tensors, and a class."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.fx.tensors import device_of

ROWS = 2
"""The number of rows in the example."""
NOW = 5
"""The number of new tokens in the example."""
BEFORE = 3
"""The number of tokens in the example's cache."""


class OtherForward:
    """A forward that a subclass mixes in before the class of a user's model."""


def with_forward(mixin: type[OtherForward], model: nn.Module) -> nn.Module:
    """Return a module over the same tensors with another forward, under the same class name."""
    user_class = type(model)
    if isinstance(model, OtherForward):
        user_class = user_class.__bases__[1]
    kind = type(user_class.__name__, (mixin, user_class), {"__module__": __name__})
    module: nn.Module = object.__new__(kind)
    module.__dict__.update(model.__dict__)
    return module


def filled_cache(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Return a cache that holds the given keys and values of every layer, without copies.

    Made from the pairs by its class, it would join each tensor to an empty one: four more traced
    ops a layer.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    initialised = DynamicLayer()
    initialised.lazy_initialization(*pairs[0])
    cache = DynamicCache()
    for keys, values in pairs:
        layer = copy.copy(initialised)
        layer.keys = keys
        layer.values = values
        cache.layers.append(layer)
    return cache


def check_forward(model: nn.Module) -> None:
    """Raise for a model whose forward is not that of its class."""
    if "forward" in model.__dict__:
        raise LoraFxError(
            f"the forward of this {type(model).__name__} object was replaced",
            "build the model again: only the forward of its class can take a cache",
        )


def device_of_inputs(model: nn.Module) -> torch.device:
    """Return the device of a model's inputs; the CPU for a model without weights."""
    device = device_of(model)
    return torch.device("cpu") if device.type == "meta" else device


def tokens(model: Any, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return random tokens of a model, [ROWS, length]."""
    number = int(model.config.get_text_config().vocab_size)
    drawn = torch.randint(0, number, (ROWS, length), generator=generator)
    return drawn.to(device_of_inputs(model))


def cache_name(forward: Any) -> str:
    """Return the name of the forward's argument that takes the cache object."""
    if "cache" in inspect.signature(forward).parameters:
        return "cache"
    return "past_key_values"


def cache_of(out: Any) -> Any:
    """Return the cache object of a model's output; its field has one of two names."""
    return getattr(out, "cache", None) or getattr(out, "past_key_values", None)
