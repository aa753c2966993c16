"""The part that an initialisation took off the base weight, redone from the base alone.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start from factors of W and train on the
residual W₀ = W − s·b₀a₀, which PEFT computes again whenever it loads such an adapter. So the
merged weight is W₀ + s·ba and not W + s·ba.

======  ===============================  ==============================================
name    s·b₀a₀                           unique
======  ===============================  ==============================================
pissa   the best rank-r part of W        where σ_r > σ_{r+1} (Eckart and Young 1936)
olora   s · Q_r R_r of W = QR            where the first r columns of W are independent
======  ===============================  ==============================================

Q_r R_r is the projection of W onto its first r columns, so signs of the QR do not matter. PEFT
computes in fp32, on whatever device; here in fp64, which differs from it by rounding alone. The
residual is rounded to W's dtype, in which PEFT keeps it.
"""

from __future__ import annotations

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.lowrank import LowRank

_GAP = 1e-5
"""σ_r − σ_{r+1} over σ₁ under which fp32 on another device would take another part off."""
_INDEPENDENT = 1e-5
"""The least |R_ii| over the largest under which the first columns count as dependent."""


def residual(weight: Array, low: LowRank, where: str) -> Array:
    """W₀, in W's dtype.

    Args:
        weight: [out, in] of the base, in its own dtype; the whole matrix.
        low: An update with `extra["mutated"]`.
        where: The weight, for messages.

    Raises:
        LoraFxError: The part is not unique, or the rank does not fit.
    """
    part = removed(weight, low.rank, low.scale, str(low.extra["mutated"]), where)
    return np.asarray((weight.astype(np.float32) - part).astype(weight.dtype))


def removed(weight: Array, rank: int, scale: float, how: str, where: str) -> Array:
    """s·b₀a₀ in fp32, [out, in].

    Args:
        weight: [out, in].
        rank: r.
        scale: s; only OLoRA's part depends on it.
        how: pissa or olora.
        where: The weight, for messages.
    """
    if weight.ndim != 2 or not 0 < rank <= min(weight.shape):
        raise LoraFxError(
            f"{where}: {list(weight.shape)} has no {how} start of rank {rank}",
            "was the adapter trained on another model?",
        )
    wide = weight.astype(np.float64)
    if not np.isfinite(wide).all():
        raise LoraFxError(f"{where}: the base has NaN or infinite values")
    left, right = factors(wide, rank, how, where)
    return np.asarray((left @ right * (1.0 if how == "pissa" else scale)).astype(np.float32))


def factors(weight: Array, rank: int, how: str, where: str = "") -> tuple[Array, Array]:
    """The part's two factors, [out, rank] and [rank, in] in fp64; OLoRA's still lacks the s.

    One side is orthonormal: the left one of OLoRA, that of the smaller side of PiSSA. `where` is
    given where the part is to be redone: then one that is not unique is an error.
    """
    return (_leading if how == "pissa" else _projected)(weight, rank, where)


def _leading(weight: Array, rank: int, where: str) -> tuple[Array, Array]:
    """The best approximation of this rank, by the eigenvectors of the smaller Gram matrix."""
    flat = weight if weight.shape[0] <= weight.shape[1] else weight.T
    values, vectors = np.linalg.eigh(flat @ flat.T)  # ascending
    sigma = np.sqrt(np.maximum(values[::-1], 0))
    if where and rank < len(sigma) and sigma[rank - 1] - sigma[rank] <= _GAP * sigma[0]:
        raise LoraFxError(
            f"{where}: singular values {rank} and {rank + 1} are equal to fp32 "
            f"({sigma[rank - 1]:g}, {sigma[rank]:g}), so PiSSA's part is not unique",
            "save the adapter again with path_initial_model_for_weight_conversion",
        )
    top = vectors[:, len(values) - rank :][:, ::-1]
    rest = top.T @ flat
    return (top, rest) if flat is weight else (rest.T, top.T)


def _projected(weight: Array, rank: int, where: str) -> tuple[Array, Array]:
    """The projection onto the first columns."""
    q, r = np.linalg.qr(weight[:, :rank])
    size = np.abs(np.diag(r))
    if where and size.min() <= _INDEPENDENT * size.max():
        raise LoraFxError(
            f"{where}: the first {rank} columns are not independent, so the part that OLoRA took "
            "off is not unique",
            "save the adapter again with path_initial_model_for_weight_conversion",
        )
    return q, q.T @ weight
