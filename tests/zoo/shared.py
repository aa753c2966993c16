"""Captures that tests share: traced once a process, under weights of each test's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lora_fx
from lora_fx.fx.capture.capture import Captured

from .models import ZOO

STAGES = {
    "hf_bert": ("bert.encoder.layer",),
    "hf_gpt2": ("transformer.h",),
    "hf_llama": ("model.layers",),
    **dict.fromkeys(("timm_resnet18", "tv_resnet18"), tuple(f"layer{i}" for i in range(1, 5))),
    "transformer_encoder": ("layers",),
}
"""Where a model of the zoo repeats a block."""

_TRACED: dict[str, tuple[Captured, tuple[Any, ...], dict[str, Any]]] = {}


def zoo(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(model, args, kwargs) of the zoo; of `NAME/1` each stage has its first block only."""
    name, _, cut = name.partition("/")
    model, args, kwargs = ZOO[name].build()
    for stage in STAGES[name] if cut else ():
        parent, _, last = stage.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, last, getattr(owner, last)[:1])
    if cut and hasattr(model, "config"):
        model.config.num_hidden_layers = 1
    return model, args, kwargs


def captured(
    name: str, build: Callable[[], tuple[Any, ...]] | None = None
) -> tuple[Captured, tuple[Any, ...], dict[str, Any]]:
    """(capture, args, kwargs) of `zoo(name)`, or of what `build` gives under another name.

    The weights are a copy, so that a test may change them: `.model` is the module. The graphs are
    those that were traced first, and what one test traces (another mode, other arguments) the next
    one has.
    """
    if name not in _TRACED:
        model, args, *rest = build() if build else zoo(name)
        kwargs = rest[0] if rest else {}
        _TRACED[name] = lora_fx.capture(model, args, kwargs), args, kwargs
    first, args, kwargs = _TRACED[name]
    own = copy.deepcopy(first)  # shares graphs and weights
    own.model = copy.deepcopy(first.model)
    own.tracings = first.tracings
    return own, args, kwargs
