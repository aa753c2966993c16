"""DoRA's rescaling of a weight, in blocks and in graphs. Liu et al. 2024 (arXiv:2402.09353).

In [out, in] order V = W + s·b·a, and the new weight is diag(magnitude / ‖V‖) · V, where ‖V‖ is the
norm of each row: over everything but out.

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

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Emitter
from lora_fx.ir.layout import Layout


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
        magnitude: [out].
        sums: `squares` over all of in, [out].
        where: The weight, for messages.

    Raises:
        LoraFxError: The sizes differ, or a row of V is zero or not finite.
    """
    if magnitude.shape != sums.shape:
        raise LoraFxError(
            f"{where}: the DoRA magnitude has {magnitude.size} numbers; the weight has "
            f"{sums.size} rows",
            "was the adapter trained on another model?",
        )
    bad = np.flatnonzero(~(np.isfinite(sums) & (sums > 0)))
    if bad.size:
        raise LoraFxError(
            f"{where}: row {bad[0]} of W + ΔW is zero or not finite; DoRA divides by its norm",
            "was the adapter trained on this model?",
        )
    return np.asarray(magnitude / np.sqrt(sums).astype(magnitude.dtype))


def rescaled(e: Emitter[V], layout: Layout, v: V, magnitude: V | None) -> V:
    """diag(magnitude / ‖V‖) · V in the stored shape, in any IR.

    The norm is no function of the factors for gradients (section 4.3 of the paper), as in PEFT.

    Args:
        e: Of the IR.
        layout: How [*batch, out, in] lies in v.
        v: W + s·b·a, as it is stored.
        magnitude: [*batch, out].
    """
    rows = e.op("mul", layout.from_stored(e, v), stretch(e, layout, v, magnitude))
    return layout.to_stored(e, rows)


def stretch(e: Emitter[V], layout: Layout, v: V, magnitude: V | None) -> V:
    """Magnitude / ‖V‖ as [*batch, out, 1]; see `rescaled`."""
    norm = e.op("detach", e.op("norm", layout.from_stored(e, v)))
    column = e.op("reshape", magnitude, shape=(*layout.batch_shape, layout.out_size, 1))
    return e.op("div", column, norm)
