"""What a file is made for: a processor or a device whose kernels its graph suits, or any runtime.

A file computes the same on every provider. On a device, a node without a kernel there is a copy
between host and device in every run, so a file that is made for a device has other forms of what
the device has no kernel for. A portable file holds what other runtimes than ONNX Runtime take too.
The provider that a file is proven on is another question.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_fx.onnx.consumers import require_portable
from lora_fx.onnx.rewrites.fast_codes import FastCodes
from lora_fx.onnx.rewrites.guard_lookups import GuardLookups
from lora_fx.onnx.rewrites.pad_to_concat import PadToConcat
from lora_fx.onnx.rewrites.range_from_size import RangeFromSize

if TYPE_CHECKING:
    import onnx_ir as ir

CPU = "cpu"
PORTABLE = "portable"
MADE_FOR = (CPU, "cuda", "webgpu", PORTABLE)
TARGETS = "use cpu, cuda, webgpu or portable"
"""The hint for an unknown target."""
PROPERTY = "lora_fx.target"
"""The key of a file's metadata that says what it is made for; a file for the CPU has none."""

LEAST_RANKS = {"webgpu": 1, PORTABLE: 1}
"""Targets on which A and B of the base have a rank, of zeros. A product over rank 0 ends the
process on WebGPU (onnxruntime-ep-webgpu 0.4.0), and sessions of other programs do not know;
OpenVINO 2026.4.1 reads [in, 0] as a number and refuses the product."""

DEVICE_FORMS: Mapping[str, ir.passes.InPlacePass] = {
    "ranges from sizes": RangeFromSize(),
    "pads as joins": PadToConcat(),
    "codes without zero points": FastCodes(),
}
"""The rewrites of a graph for a device, in order, by the names of stages."""

PORTABLE_FORMS: Mapping[str, ir.passes.InPlacePass] = {"lookups that tell": GuardLookups()}
"""The rewrites of a graph for any runtime, by the names of stages."""


def make_for(model: ir.Model, target: str) -> None:
    """Give a graph the forms that its target has kernels for, and write the target into it.

    Args:
        model: Changed in place, unless the target is the CPU.
        target: One of MADE_FOR.

    Raises:
        LoraFxError: It cannot be portable, as it should be.
    """
    for rewrite in forms_for(target).values():
        rewrite(model)
    say_target(model, target)


def forms_for(target: str) -> Mapping[str, ir.passes.InPlacePass]:
    """Return the rewrites of a graph for a target, in order, by the names of stages."""
    if target == PORTABLE:
        return PORTABLE_FORMS
    return DEVICE_FORMS if is_device(target) else {}


def is_device(target: str) -> bool:
    """Whether a target is a device, with memory of its own."""
    return target not in (CPU, PORTABLE)


def say_target(model: ir.Model, target: str) -> None:
    """Write into a model what it is made for; a file for the CPU says nothing.

    Raises:
        LoraFxError: It cannot be portable, as it should be.
    """
    if target == PORTABLE:
        require_portable(model)
    if target == CPU:
        model.metadata_props.pop(PROPERTY, None)
    else:
        model.metadata_props[PROPERTY] = target
