"""The precision in which torch computes a captured model."""

from __future__ import annotations

from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.quantised_parameters import forms


def precision_of(captured: Captured) -> str:
    """Return the name of its dtype; int8 where weights are codes."""
    if forms(captured.model):
        return "int8"
    return dtype_name(captured.base_dtype) if captured.base_dtype else "float32"
