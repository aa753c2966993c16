"""What a file is made for: the processor or the device whose kernels its graph suits.

A file computes the same on every provider. On a device, a node without a kernel there is a copy
between host and device in every run, so a file that is made for a device has other forms of what
the device has no kernel for. The provider that a file is proven on is another question.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_fx.onnx.rewrites.fast_codes import FastCodes
from lora_fx.onnx.rewrites.pad_to_concat import PadToConcat
from lora_fx.onnx.rewrites.range_from_size import RangeFromSize

if TYPE_CHECKING:
    import onnx_ir as ir

CPU = "cpu"
MADE_FOR = (CPU, "cuda", "webgpu")
PROPERTY = "lora_fx.target"
"""The key of a file's metadata that says what it is made for; a file for the CPU has none."""

LEAST_RANKS = {"webgpu": 1}
"""Targets on which the defaults of switchable A and B have a rank, of zeros. A product over rank 0
ends the process there (onnxruntime-ep-webgpu 0.4.0), and sessions of other programs do not know."""

DEVICE_FORMS: Mapping[str, ir.passes.InPlacePass] = {
    "ranges from sizes": RangeFromSize(),
    "pads as joins": PadToConcat(),
    "codes without zero points": FastCodes(),
}
"""The rewrites of a graph for a device, in order, by the names of stages."""


def make_for(model: ir.Model, target: str) -> None:
    """Give a graph the forms that its target has kernels for, and write the target into it.

    Args:
        model: Changed in place, unless the target is the CPU.
        target: One of MADE_FOR.
    """
    if target == CPU:
        say_target(model, target)
        return
    for rewrite in DEVICE_FORMS.values():
        rewrite(model)
    say_target(model, target)


def say_target(model: ir.Model, target: str) -> None:
    """Write into a model what it is made for; a file for the CPU says nothing."""
    if target == CPU:
        model.metadata_props.pop(PROPERTY, None)
    else:
        model.metadata_props[PROPERTY] = target
