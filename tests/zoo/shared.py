"""Captures that tests share: traced once a process, under weights of each test's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lora_fx
from lora_fx.fx.capture.capture import Captured

from .models import ZOO

_TRACED: dict[str, tuple[Captured, tuple[Any, ...], dict[str, Any]]] = {}


def captured(
    name: str, build: Callable[[], tuple[Any, ...]] | None = None
) -> tuple[Captured, tuple[Any, ...], dict[str, Any]]:
    """(capture, args, kwargs) of a model of the zoo, or of what `build` gives under another name.

    The weights are a copy, so that a test may change them: `.model` is the module. The graphs are
    those that were traced first, and what one test traces (another mode, other arguments) the next
    one has.
    """
    if name not in _TRACED:
        model, args, *rest = (build or ZOO[name].build)()
        kwargs = rest[0] if rest else {}
        _TRACED[name] = lora_fx.capture(model, args, kwargs), args, kwargs
    first, args, kwargs = _TRACED[name]
    own = copy.deepcopy(first)  # shares graphs and weights
    own.model = copy.deepcopy(first.model)
    own.tracings = first.tracings
    return own, args, kwargs
