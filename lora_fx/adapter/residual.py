"""The part that an initialisation took off the base weight, redone from the base alone.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start from factors of W and train on the
residual W₀ = W − s·b₀a₀, which PEFT computes again whenever it loads such an adapter. So the
merged weight is W₀ + s·ba and not W + s·ba. KaSA (arXiv:2412.06071) trains on W without its
least singular parts.

======  ===============================  ==============================================
name    s·b₀a₀                           unique
======  ===============================  ==============================================
pissa   the best rank-r part of W        where σ_r > σ_{r+1} (Eckart and Young 1936)
olora   s · Q_r R_r of W = QR            where the first r columns of W are independent
kasa    the last r singular parts of W   where σ_{k−r} > σ_{k−r+1}, k the smaller side
======  ===============================  ==============================================

Q_r R_r is the projection of W onto its first r columns, so signs of the QR do not matter. PEFT
computes in fp32, on whatever device; here in fp64, which differs from it by rounding alone. The
residual is rounded to W's dtype, in which PEFT keeps it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_fx.adapter.lowrank import (
    LowRank,
    alpha_of,
)
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError

_GAP = 1e-5
"""Below this (σ_r − σ_{r+1})/σ₁, fp32 on another device would take another part off."""


_INDEPENDENT = 1e-5
"""Below this ratio of the least |R_ii| to the largest, the first columns count as dependent."""


def residual(weight: Array, low: LowRank, where: str) -> Array:
    """The weight W₀ that was trained on, in W's dtype.

    Args:
        weight: [out, in] of the base, in its own dtype; the whole matrix.
        low: An update that is `mutated`.
        where: The weight, for messages.

    Raises:
        LoraFxError: The part is not unique, or the rank does not fit.
    """
    left, right = removed(weight, low, where)
    part = np.asarray((left @ right).astype(np.float32))
    return np.asarray((weight.astype(np.float32) - part).astype(weight.dtype))


def on_base(weight: Array, low: LowRank, where: str) -> LowRank:
    """The update of the base itself, of rank 2r: −s·b₀a₀ is a frozen half of it.

    Args and errors are those of `residual`.
    """
    left, right = removed(weight, low, where)
    scale = low.scale or 1.0  # an update of scale 0 has the part all the same
    trained = replace(low, b=low.b * np.float32(low.scale / scale), mutated="")
    a = right.astype(np.float32)
    b = (left / scale).astype(np.float32)
    return with_frozen_start(trained, scale, a, b)


def removed(weight: Array, low: LowRank, where: str) -> tuple[Array, Array]:
    """The factors of the part s·b₀a₀, in fp64; see `residual`."""
    start = low.mutated
    highest_rank = min(weight.shape)
    if start == "kasa":  # it leaves a part
        highest_rank -= 1
    if weight.ndim != 2 or not 0 < low.rank <= highest_rank:
        raise MisfitError(
            f"{where}: a weight {list(weight.shape)} has no {start} initialisation of rank "
            f"{low.rank}"
        )
    wide = weight.astype(np.float64)
    if not np.isfinite(wide).all():
        raise LoraFxError(
            f"{where}: the base has NaN or infinite values", "use a base with finite values"
        )
    left, right = start_of_weight(wide, low.rank, start, where)
    if start == "olora":
        left = left * low.scale
    return left, right


def start_of_weight(weight: Array, rank: int, start: str, where: str = "") -> tuple[Array, Array]:
    """The part's two factors, [out, rank] and [rank, in] in fp64; OLoRA's still lacks the s.

    One side is orthonormal: the left one of OLoRA, that of the smaller side of the others.

    Args:
        weight: W [out, in] in fp64.
        rank: The rank of the part.
        start: pissa, olora or kasa.
        where: The weight, for messages, where the part is to be redone: then one that is not
            unique is an error.
    """
    if start != "olora":
        return _singular_parts(weight, rank, start, where)
    q, r = np.linalg.qr(weight[:, :rank])
    sizes = np.abs(np.diag(r))
    if where and sizes.min() <= _INDEPENDENT * sizes.max():
        raise LoraFxError(
            f"{where}: the first {rank} columns are not independent, so the part that OLoRA "
            "subtracted is not unique",
            "save the adapter again with path_initial_model_for_weight_conversion",
        )
    return q, q.T @ weight


def _singular_parts(weight: Array, rank: int, start: str, where: str) -> tuple[Array, Array]:
    """The first or the last singular parts, by the eigenvectors of the smaller Gram matrix."""
    is_wide = weight.shape[0] <= weight.shape[1]
    wide = weight if is_wide else weight.T
    eigenvalues, eigenvectors = np.linalg.eigh(wide @ wide.T)  # ascending
    sigma = np.sqrt(np.maximum(eigenvalues[::-1], 0))
    vectors = eigenvectors[:, ::-1]

    # The part begins or ends between two singular values, which have to differ.
    boundary = rank if start == "pissa" else len(sigma) - rank
    if where and boundary < len(sigma):
        before = sigma[boundary - 1]
        after = sigma[boundary]
        if before - after <= _GAP * sigma[0]:
            raise LoraFxError(
                f"{where}: singular values {boundary} and {boundary + 1} are equal in fp32 "
                f"({before:g}, {after:g}), so the part that {start} subtracted is not unique",
                "save the adapter again with path_initial_model_for_weight_conversion",
            )
    basis = vectors[:, :rank] if start == "pissa" else vectors[:, boundary:]
    coefficients = basis.T @ wide
    if is_wide:
        return basis, coefficients
    return coefficients.T, basis.T


def with_frozen_start(low: LowRank, scale: float, a: Array, b: Array) -> LowRank:
    """The update with −b·a in additional frozen ranks, which subtract b·a from it.

    Args:
        low: The update.
        scale: The scale of both.
        a: In fp32, of the update's rank.
        b: In fp32, of the update's rank.
    """
    alpha = alpha_of(scale, 2 * low.rank, low.variant)
    a = np.concatenate([low.a, a], -2)
    b = np.concatenate([low.b, -b], -1)
    return replace(low, a=a, b=b, alpha=alpha, frozen=low.rank)
