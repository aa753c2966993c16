"""LoRA whose scale is a tensor and no constant of the program: ΔW = b·s·a with a number s.

A compiled program then takes adapters of every scale. The scale is not multiplied into b once and
for all: an optimizer would take other steps with b·s than with b. No user names this variant, and
no file holds it: `lora_fx.adapter.target_union` makes it for a compiled module.
"""

from __future__ import annotations

from lora_fx.adapter.lora import Lora
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant_protocol import Read, Variant
from lora_fx.ir.emitter import Ops, V

SCALE = "scale"
"""The field of s, a tensor without axes."""


class RuntimeScale(Lora):
    """The variant W + b·s·a; a and b of such an update are those of ΔW, so that b has s in it."""

    made_of = ("a", "b", SCALE)
    unsaved = (SCALE,)
    scale_is_one = True

    def of(self, low: LowRank) -> Variant | None:
        """Return this variant for an update that has the tensor s."""
        return self if SCALE in low.variant_tensors else None

    def b(self, e: Ops[V], read: Read[V]) -> V:
        """Return b·s."""
        return e.op("mul", read("b"), read(SCALE))


RUNTIME_SCALE = RuntimeScale("lora", still=(SCALE,))
