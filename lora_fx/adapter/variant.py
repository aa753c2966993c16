"""The variants that insert trains: what each holds, what it makes of W, and how it learns.

=======  ==========================================  ==================  ========================
name     W'                                          trained             in PEFT's files
=======  ==========================================  ==================  ========================
lora     W + s·b·a, s = alpha/rank                   a, b                lora_A, lora_B
rslora   W + s·b·a, s = alpha/√rank                  a, b                … and use_rslora
dora     m/‖V‖ · V, V = W + s·b·a, s as of lora      a, b, magnitude m   … use_dora, magnitude
lora-fa  as lora                                     b                   as lora
lora+    as lora                                     b at 16 × the rate  as lora
qalora   as lora, ΔW constant over 32 inputs;        a of groups, b      … and use_qalora
         qalora:G over G
=======  ==========================================  ==================  ========================

lora: Hu et al. 2021 (2106.09685). rslora: Kalajdzievski 2023 (2312.03732). dora: Liu et al. 2024
(2402.09353). lora-fa: Zhang et al. 2023 (2308.03303). lora+: Hayou et al. 2024 (2402.12354).
qalora: Xu et al. 2023 (2309.14717).

A variant composes Kinds and knows no IR. Its tensors by name are `lora_fx.adapter.lowrank`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from lora_fx.adapter.lowrank import LowRank, grouped, scale_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError, near
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.layout import Layout


@dataclass(frozen=True)
class Lora:
    """W + s·b·a; a variant with another W' is a class of its own.

    Attributes:
        name: The variant's name.
        ratio: The learning rate of b over that of a.
        branches: True when s·b·a can be added beside the op; False when the op has to read W'.
    """

    name: str
    ratio: float = 1.0
    branches: ClassVar[bool] = True

    def scale(self, alpha: float, rank: int) -> float:
        """The factor s before b·a."""
        return scale_of(alpha, rank, self.name)

    def prepared(self, low: LowRank, weight: Array | None, where: str) -> LowRank:
        """The update with the tensors that this variant has beside a and b.

        Args:
            low: An update of this variant whose W' is still W.
            weight: The base weight as [*batch, out, in]; only dora reads it.
            where: The target, for messages.
        """
        return low

    def change(self, e: Ops[V], layout: Layout, w: V, delta: V, magnitude: V | None) -> V:
        """W' − W in the stored shape.

        Args:
            e: An emitter of any IR.
            layout: The layout of the update.
            w: The stored tensor, or the region that the update is for.
            delta: s·b·a in the same shape.
            magnitude: [*batch, out], where the update has one.
        """
        return delta

    def rates(self, lr: float) -> dict[str, float]:
        """The learning rate of each field of `lora_fx.adapter.lowrank`."""
        return {"a": lr, "b": lr * self.ratio, "magnitude": lr * self.ratio}


class Dora(Lora):
    """The rows of W + s·b·a are given lengths of their own, which are trained."""

    branches = False

    def scale(self, alpha: float, rank: int) -> float:
        """The factor s, which is that of lora: the magnitude is not part of it."""
        return scale_of(alpha, rank)

    def prepared(self, low: LowRank, weight: Array | None, where: str) -> LowRank:
        """The magnitude starts at the lengths of W's own rows, so that W' = W.

        Raises:
            LoraFxError: A row of W is zero or not finite.
        """
        assert weight is not None
        wide = weight.reshape(-1, weight.shape[-1])
        sums = squares(wide)
        size = np.sqrt(sums).astype(np.float32)
        factors(size, sums, where)  # raises for a row that has no direction
        return replace(low, variant="lora", magnitude=size.reshape(weight.shape[:-1]))

    def change(self, e: Ops[V], layout: Layout, w: V, delta: V, magnitude: V | None) -> V:
        """m/‖V‖ · V − W."""
        new = rescaled(e, layout, e.op("add", w, delta), magnitude)
        return e.op("add", new, e.op("mul", w, -1.0))


@dataclass(frozen=True)
class QaLora(Lora):
    """Each column of a is that of a group of inputs, so that zero points of codes can hold ΔW.

    Attributes:
        group: Inputs of a group; whole blocks of the codes that it shall be folded into.
    """

    group: int = 32

    def prepared(self, low: LowRank, weight: Array | None, where: str) -> LowRank:
        """An a [*batch, rank, in/group] within ±1/√(in/group), as PEFT draws it.

        Raises:
            LoraFxError: The groups do not divide the inputs.
        """
        width = low.a.shape[-1]
        if width % self.group:
            raise LoraFxError(
                f"{where}: {width} inputs are no whole groups of {self.group}",
                f"exclude it, or --variant qalora:{math.gcd(width, self.group)}",
            )
        a = low.a[..., :: self.group] * np.float32(self.group**0.5)
        return grouped(replace(low, a=a, variant="lora"), self.group)


VariantName = Literal["lora", "rslora", "dora", "lora-fa", "lora+", "qalora"] | str
"""Those of VARIANTS; a text, since qalora may carry the size of its groups: qalora:32."""
VARIANTS: Mapping[str, Lora] = {
    v.name: v
    for v in (
        Lora("lora"),
        Lora("rslora"),  # its scale falls with √rank, so that high ranks learn as fast as low ones
        Dora("dora"),
        Lora("lora-fa"),  # a stays as it was drawn: neither its gradient nor x has to be kept
        Lora("lora+", ratio=16.0),
        QaLora("qalora"),
    )
}


def named_variant(name: str) -> Lora:
    """The variant of a name; LoraFxError where there is none."""
    kind, _, size = name.partition(":")
    if kind == "qalora" and size.isascii() and size.isdigit() and int(size):
        return QaLora(kind, group=int(size))
    if name not in VARIANTS:
        raise LoraFxError(
            f"no variant {name!r}", near(name, VARIANTS, f"the variants are {', '.join(VARIANTS)}")
        )
    return VARIANTS[name]


def variant_of(low: LowRank) -> Lora:
    """What an update is: one with a magnitude is DoRA's, whatever its scale."""
    return VARIANTS["dora"] if low.magnitude is not None else named_variant(low.variant)


# DoRA's rescaling of a weight, in blocks and in graphs. Liu et al. 2024 (arXiv:2402.09353).
#
# In [out, in] order V = W + s·b·a, and the new weight is diag(magnitude / ‖V‖) · V, where ‖V‖ is
# the norm of each row: over everything but out.
#
# ===========  ========================================  ===========================
# op           rows of V are                             stored axis of the magnitude
# ===========  ========================================  ===========================
# linear       outputs: W[o, :]                          0
# HF Conv1D    outputs; W is stored [in, out]            1
# convolution  output channels: W[o, :, …], all taps     0
# embedding    features; W is stored [rows, dim]         1
# ===========  ========================================  ===========================
#
# PEFT's order of operations, fp32: (W + s·b·a), its norm, magnitude / norm, the product; one
# rounding to W's dtype at the end. V is made from W as it is stored, widened to fp32.


def squares(block: Array) -> Array:
    """Sums of squares of the rows of a block of V, fp64 [rows]; those of column blocks add up.

    Args:
        block: [rows, columns] of V.
    """
    wide = block.astype(np.float64)
    return np.asarray(np.einsum("ij,ij->i", wide, wide))


def factors(magnitude: Array, sums: Array, where: str) -> Array:
    """What the rows of V are multiplied by: magnitude / norm, [out], in the magnitude's dtype.

    Args:
        magnitude: The norms that the rows shall have, [out].
        sums: `squares` summed over all of in, [out].
        where: The weight, for messages.

    Raises:
        LoraFxError: The sizes differ, or a row of V is zero or not finite.
    """
    if magnitude.shape != sums.shape:
        raise MisfitError(
            f"{where}: the DoRA magnitude has {magnitude.size} numbers; the weight has "
            f"{sums.size} rows"
        )
    bad = np.flatnonzero(~(np.isfinite(sums) & (sums > 0)))
    if bad.size:
        raise LoraFxError(
            f"{where}: row {bad[0]} of W + ΔW is zero or not finite; DoRA divides by its norm",
            "was the adapter trained on this model?",
        )
    return np.asarray(magnitude / np.sqrt(sums).astype(magnitude.dtype))


def rescaled(e: Ops[V], layout: Layout, v: V, magnitude: V | None) -> V:
    """diag(magnitude / ‖V‖) · V in the stored shape, in any IR.

    The norm is no function of the factors for gradients (section 4.3 of the paper), as in PEFT.

    Args:
        e: An emitter of the IR.
        layout: How [*batch, out, in] lies in v.
        v: The sum W + s·b·a, as it is stored.
        magnitude: The norms that the rows shall have, [*batch, out].
    """
    rows = e.op("mul", layout.from_stored(e, v), stretch(e, layout, v, magnitude))
    return layout.to_stored(e, rows)


def stretch(e: Ops[V], layout: Layout, v: V, magnitude: V | None) -> V:
    """Magnitude / ‖V‖ as [*batch, out, 1]; see `rescaled`."""
    norm = e.op("detach", e.op("norm", layout.from_stored(e, v)))
    column = e.op("reshape", magnitude, shape=(*layout.batch_shape, layout.out_size, 1))
    return e.op("div", column, norm)
