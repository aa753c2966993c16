"""A second try with eager attention, where a model of transformers offers it.

Some kernels of attention cannot be traced, or have no translation; the plain products of `eager`
compute the same. The model itself is as it was afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lora_fx.errors import CaptureError, LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.passes.verbs.open import captured_again

REFUSED = "torch's ONNX exporter refused the model"
"""The beginning of every error of the translation."""


def may_help(model: object, error: LoraFxError) -> bool:
    """True where the model could not be captured or translated, and has another attention."""
    if not isinstance(error, CaptureError) and not error.message.startswith(REFUSED):
        return False
    source = model.model if isinstance(model, Captured) else model
    attention = getattr(getattr(source, "config", None), "_attn_implementation", "eager")
    return attention not in (None, "eager") and hasattr(source, "set_attn_implementation")


@contextlib.contextmanager
def eager(model: Any) -> Iterator[Any]:
    """The model with eager attention while the block runs; a capture is made again from it."""
    source: Any = model.model if isinstance(model, Captured) else model
    attention = source.config._attn_implementation
    source.set_attn_implementation("eager")
    try:
        if isinstance(model, Captured):
            model = captured_again(model, source)
        yield model
    finally:
        source.set_attn_implementation(attention)
