"""The variants that insert trains: what each holds, what it makes of W, and how it learns.

=======  ==========================================  ==================  ========================
name     W'                                          trained             in PEFT's files
=======  ==========================================  ==================  ========================
lora     W + s·b·a, s = alpha/rank                   a, b                lora_A, lora_B
rslora   W + s·b·a, s = alpha/√rank                  a, b                … and use_rslora
dora     m/‖V‖ · V, V = W + s·b·a (lora_fx.dora)     a, b, magnitude m   … and use_dora, magnitude
lora-fa  as lora                                     b                   as lora
lora+    as lora                                     b at 16 × the rate  as lora
=======  ==========================================  ==================  ========================

lora: Hu et al. 2021 (2106.09685). rslora: Kalajdzievski 2023 (2312.03732). dora: Liu et al. 2024
(2402.09353). lora-fa: Zhang et al. 2023 (2308.03303). lora+: Hayou et al. 2024 (2402.12354).

A variant composes Kinds and knows no IR. Its tensors by name are `lora_fx.slots`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np

from lora_fx import dora
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Emitter
from lora_fx.ir.layout import Layout
from lora_fx.lowrank import LowRank, scale_of


class Lora:
    """W + s·b·a; the others differ from it in what they say here."""

    name: ClassVar[str] = "lora"
    branches: ClassVar[bool] = True
    """Whether the update can stand beside the op; else only W' can."""
    ratio: ClassVar[float] = 1.0
    """b's learning rate over a's."""

    def scale(self, alpha: float, rank: int) -> float:
        """What b·a is multiplied by."""
        return scale_of(alpha, rank, self.name)

    def prepared(self, low: LowRank, weight: Array | None, where: str) -> LowRank:
        """The update with the tensors that this variant has beside a and b.

        Args:
            low: Of this variant's name, W' = W so far.
            weight: [*batch, out, in] of the base; read by dora only.
            where: The target, for messages.
        """
        return low

    def change(self, e: Emitter[V], layout: Layout, w: V, delta: V, magnitude: V | None) -> V:
        """W' − W in the stored shape.

        Args:
            e: Of any IR.
            layout: Of the update.
            w: The stored tensor, or the region that the update is for.
            delta: s·b·a in the same shape.
            magnitude: [*batch, out], where the update has one.
        """
        return delta

    def rates(self, lr: float) -> dict[str, float]:
        """Learning rate by field of `lora_fx.slots`."""
        return {"a": lr, "b": lr * self.ratio, "magnitude": lr * self.ratio}


class RsLora(Lora):
    """The scale falls with √rank, so that high ranks learn as fast as low ones."""

    name = "rslora"


class Dora(Lora):
    """The rows of W + s·b·a are given lengths of their own, which are trained."""

    name = "dora"
    branches = False

    def scale(self, alpha: float, rank: int) -> float:
        """As lora."""
        return scale_of(alpha, rank)

    def prepared(self, low: LowRank, weight: Array | None, where: str) -> LowRank:
        """The magnitude starts at the lengths of W's own rows, so that W' = W.

        Raises:
            LoraFxError: A row of W is zero or not finite.
        """
        assert weight is not None
        wide = weight.reshape(-1, weight.shape[-1])
        sums = dora.squares(wide)
        size = np.sqrt(sums).astype(np.float32)
        dora.factors(size, sums, where)  # raises for a row that has no direction
        return replace(low, variant="lora", magnitude=size.reshape(weight.shape[:-1]))

    def change(self, e: Emitter[V], layout: Layout, w: V, delta: V, magnitude: V | None) -> V:
        """m/‖V‖ · V − W."""
        new = dora.rescaled(e, layout, e.op("add", w, delta), magnitude)
        return e.op("add", new, e.op("mul", w, -1.0))


class LoraFA(Lora):
    """a stays as it was drawn: neither its gradient nor x has to be kept for it."""

    name = "lora-fa"


class LoraPlus(Lora):
    """b learns faster than a."""

    name = "lora+"
    ratio = 16.0


VARIANTS: Mapping[str, Lora] = {v.name: v for v in (Lora(), RsLora(), Dora(), LoraFA(), LoraPlus())}


def named_variant(name: str) -> Lora:
    """The variant of a name; raises LoraFxError where there is none."""
    if name not in VARIANTS:
        raise LoraFxError(f"no variant {name!r}", f"the variants are {', '.join(VARIANTS)}")
    return VARIANTS[name]


def variant_of(low: LowRank) -> Lora:
    """What an update is: one with a magnitude is DoRA's, whatever its scale."""
    return VARIANTS["dora"] if low.magnitude is not None else named_variant(low.variant)
