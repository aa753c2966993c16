"""dora: each row of W + s·b·a gets a trained length.

Liu et al. 2024 (arXiv:2402.09353). In [out, in] order V = W + s·b·a, and the new weight is
diag(magnitude / ‖V‖) · V, where ‖V‖ is the norm of each row: over everything but out.

===========  ========================================  ===========================
op           rows of V are                             stored axis of the magnitude
===========  ========================================  ===========================
linear       outputs: W[o, :]                          0
HF Conv1D    outputs; W is stored [in, out]            1
convolution  output channels: W[o, :, …], all taps     0
embedding    features; W is stored [rows, dim]         1
===========  ========================================  ===========================

PEFT's order of operations, fp32: (W + s·b·a), its norm, magnitude / norm, the product; one
rounding to W's dtype at the end. V is made from W as it is stored, widened to fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.lora import Lora
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant_protocol import Beginning, Read, Variant
from lora_fx.dtypes import Array, widened
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.layout import Layout


class Dora(Lora):
    """diag(m/‖V‖) · V. The magnitude m [*batch, out] is `LowRank.magnitude`."""

    title = "DoRA"
    reads_weight = True
    stretches = True
    by_rows = True
    also = ("magnitude",)

    def of(self, low: LowRank) -> Variant | None:
        """Any update with a magnitude is DoRA, whatever its scale."""
        if low.magnitude is None:
            return None
        return self

    def prepared(self, low: LowRank, beginning: Beginning) -> LowRank:
        """The magnitude starts at the lengths of W's own rows, so that W' = W.

        Raises:
            LoraFxError: A row of W is zero or not finite.
        """
        weight = beginning.weight
        assert weight is not None
        rows = weight.reshape(-1, weight.shape[-1])
        sums = squares(rows)
        lengths = np.sqrt(sums).astype(np.float32)
        factors(lengths, sums, repr(beginning.key))  # raises for a row that has no direction
        return replace(low, variant="lora", magnitude=lengths.reshape(weight.shape[:-1]))

    def beside(self, low: LowRank) -> Mapping[str, Array]:
        """The magnitude."""
        if low.magnitude is None:
            return {}
        return {"magnitude": low.magnitude}

    def with_values(self, low: LowRank, values: Mapping[str, Array]) -> LowRank:
        """See Variant."""
        low = _FACTORS.with_values(low, values)
        return replace(low, magnitude=values.get("magnitude"))

    def rows(self, low: LowRank, rows: slice | Array) -> LowRank:
        """See Variant."""
        assert low.magnitude is not None
        return replace(low, b=low.b[rows], magnitude=low.magnitude[rows])

    def turned(self, low: LowRank, key: str) -> LowRank:
        """Raise: DoRA has lengths of rows, and none of columns."""
        raise LoraFxError(
            f"the DoRA update of {key!r} is for a use that reads the tensor transposed, and the "
            "model has one weight for both uses",
            "fold it into a checkpoint with lora-fx merge",
        )

    def fitted(self, low: LowRank, key: str, layout: Layout) -> LowRank:
        """The magnitude as [*batch, out]."""
        assert low.magnitude is not None
        shape = (*layout.batch_shape, layout.out_size)
        if low.magnitude.size != math.prod(shape):
            raise MisfitError(
                f"the DoRA magnitude of {key!r} has {low.magnitude.size} numbers; the weight has "
                f"{math.prod(shape)} rows"
            )
        return replace(low, magnitude=low.magnitude.reshape(shape))

    def change(self, e: Ops[V], layout: Layout, w: V, delta: V, read: Read[V]) -> V:
        """m/‖V‖ · V − W."""
        v = e.op("add", w, delta)
        rows = e.op("mul", layout.from_stored(e, v), self.stretch(e, layout, v, read))
        return e.op("add", layout.to_stored(e, rows), e.op("mul", w, -1.0))

    def stretch(self, e: Ops[V], layout: Layout, v: V, read: Read[V]) -> V:
        """m/‖V‖ as [*batch, out, 1].

        The norm is no function of the factors for gradients (section 4.3 of the paper), as in PEFT.
        """
        magnitude = read("magnitude")
        norm = e.op("detach", e.op("norm", layout.from_stored(e, v)))
        column = e.op("reshape", magnitude, shape=(*layout.batch_shape, layout.out_size, 1))
        return e.op("div", column, norm)

    def row_factors(self, low: LowRank, rows: slice, squares: Array, where: str) -> Array:
        """See Variant."""
        assert low.magnitude is not None
        return factors(low.magnitude[rows], squares, where)


_FACTORS = Lora("lora")
"""The maths of a and b, beside the magnitude."""


def squares(block: Array) -> Array:
    """Sums of squares of the rows of a block of V, fp64 [rows]; those of column blocks add up.

    Args:
        block: [rows, columns] of V.
    """
    wide = widened(block)
    return np.asarray(np.einsum("ij,ij->i", wide, wide.conj()).real)


def factors(magnitude: Array, sums: Array, where: str) -> Array:
    """The factors of the rows of V: magnitude / norm, [out], in the magnitude's dtype.

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
    has_direction = np.isfinite(sums) & (sums > 0)
    if not has_direction.all():
        row = np.flatnonzero(~has_direction)[0]
        raise LoraFxError(
            f"{where}: row {row} of W + ΔW is zero or not finite; DoRA divides by its norm",
            "was the adapter trained on this model?",
        )
    return np.asarray(magnitude / np.sqrt(sums).astype(magnitude.dtype))
