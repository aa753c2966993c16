"""DoRA as it is served: an update of one base, which needs no norm when a model runs.

    W' = g·(W + s·b·a) = W + d∘W + s·(g·b)·a        g = m/‖W + s·b·a‖, d = g − 1

d [*batch, out] multiplies rows of W; a plain update has d = 0. No user names or trains this
variant: `lora_fx.adapter.evaluated` makes it of an update whose W' is g·V, and of one base.
"""

from __future__ import annotations

import math
from dataclasses import replace

from lora_fx.adapter.lora import Lora
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant_protocol import WHOLE, Read, Variant
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.layout import Layout

GAINS = "gains"
"""The field of d."""


class ScaledRows(Lora):
    """The variant W' = W + d∘W + s·b·a; it goes by the name of the variant that gives s."""

    title = "DoRA of one base"
    reads_weight = True
    by_rows = True
    also = (GAINS,)
    peft_type = ""

    def of(self, low: LowRank) -> Variant | None:
        """Return this variant for any update with d, whatever its scale."""
        return self if GAINS in low.variant_tensors else None

    def rows(self, low: LowRank, rows: slice | Array) -> LowRank:
        """See Variant."""
        gains = low.variant_tensors[GAINS]
        return replace(low, b=low.b[rows], variant_tensors={GAINS: gains[rows]})

    def turned(self, low: LowRank, key: str) -> LowRank:
        """Raise: there are factors of rows, and none of columns."""
        raise LoraFxError(f"{key!r}: an update with factors of rows has no transpose", WHOLE)

    def fitted(self, low: LowRank, key: str, layout: Layout) -> LowRank:
        """Return the update with d as [*batch, out]."""
        gains = low.variant_tensors[GAINS]
        shape = (*layout.batch_shape, layout.out_size)
        if gains.size != math.prod(shape):
            raise MisfitError(
                f"the factors of {key!r} are {gains.size} numbers; the weight has "
                f"{math.prod(shape)} rows"
            )
        return replace(low, variant_tensors={GAINS: gains.reshape(shape)})

    def change(self, e: Ops[V], layout: Layout, w: V, delta: V, read: Read[V]) -> V:
        """Return d∘W + s·b·a."""
        column = e.op("reshape", read(GAINS), shape=(*layout.batch_shape, layout.out_size, 1))
        rows = e.op("mul", layout.from_stored(e, w), column)
        return e.op("add", layout.to_stored(e, rows), delta)


SCALED_ROWS = ScaledRows("lora")


def has_gains(low: LowRank) -> bool:
    """Whether an update is of this variant."""
    return SCALED_ROWS.of(low) is not None


def scaled_gains(low: LowRank, weight: float) -> LowRank:
    """Return the update whose W' − W is `weight` times as large."""
    gains = low.variant_tensors[GAINS] * low.variant_tensors[GAINS].dtype.type(weight)
    return replace(low, alpha=low.alpha * weight, variant_tensors={GAINS: gains})
