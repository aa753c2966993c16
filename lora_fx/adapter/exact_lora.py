"""LoHa and LoKr as LoRA with the same ΔW, where their rank is below that of a whole matrix.

LoHa  (b₁a₁) ∘ (b₂a₂) = b·a of rank r²: row o of b is b₁[o] ⊗ b₂[o], column i of a likewise
LoKr  w₁ ⊗ w₂ = (u₁ ⊗ u₂)(v₁ ⊗ v₂) of rank r₁·r₂, where w = u·v has the rank r

Nothing is approximated: products are computed in fp64 and rounded once to fp32. The rank of w₁ and
w₂ is that of their fp32 numbers, in which the product of two factors of rank r has rank r but for
its rounding. A LoHa or LoKr that has no such form is `lora_fx.adapter.as_lora`'s to approximate.
OFT, W·(R − 1)ᵀ, has the rank of R − 1, which is as large as the matrix where all blocks turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Entry, Hadamard, Kronecker, name_of
from lora_fx.dtypes import Array, widened
from lora_fx.text import counted, some


def as_exact_lora(adapter: Adapter, name: str = "the adapter") -> tuple[Adapter, list[str]]:
    """Return the adapter with LoRA in the place of every LoHa and LoKr that has this form.

    Args:
        adapter: Bound or not.
        name: What the notes call it.

    Returns:
        The adapter, and a note for each method on the ranks that its updates have as LoRA.
    """
    entries: dict[str, Entry] = dict(adapter.entries)
    ranks: dict[str, dict[str, int]] = {}
    for key, entry in adapter.entries.items():
        low = exact_update(entry)
        if low is not None:
            entries[key] = low
            ranks.setdefault(name_of(entry), {})[key] = low.rank
    if not ranks:
        return adapter, []
    notes = [_note(name, method, of_keys) for method, of_keys in ranks.items()]
    return replace(adapter, entries=entries), notes


def exact_update(entry: Entry) -> LowRank | None:
    """Return the LoRA with the ΔW of a LoHa or LoKr; None where its rank is that of any matrix."""
    if not isinstance(entry, (Hadamard, Kronecker)):
        return None
    factors = _of_hadamard(entry) if isinstance(entry, Hadamard) else _of_kronecker(entry)
    a, b = factors
    rank = len(a)
    if not 0 < rank < min(entry.shape):
        return None
    kind = np.float32
    alpha = entry.scale * rank
    origin = Origin(kernel=entry.kernel)
    return LowRank(a.astype(kind), b.astype(kind), alpha, entry.layout, origin=origin)


def _of_hadamard(entry: Hadamard) -> tuple[Array, Array]:
    """Return a [r², in] and b [out, r²] in fp64; of no rows where r² is no less than the sides."""
    rank = entry.b1.shape[1] * entry.b2.shape[1]
    if rank >= min(entry.shape):
        return _none(entry)
    b = widened(entry.b1)[:, :, None] * widened(entry.b2)[:, None, :]
    a = widened(entry.a1)[:, None, :] * widened(entry.a2)[None, :, :]
    return a.reshape(rank, -1), b.reshape(-1, rank)


def _of_kronecker(entry: Kronecker) -> tuple[Array, Array]:
    """Return a [r₁·r₂, in] and b [out, r₁·r₂] in fp64, of no rows where that is no low rank."""
    u1, v1 = _factors(entry.w1)
    u2, v2 = _factors(entry.w2)
    if len(v1) * len(v2) >= min(entry.shape):
        return _none(entry)
    return np.kron(v1, v2), np.kron(u1, u2)


def _none(entry: Hadamard | Kronecker) -> tuple[Array, Array]:
    """Return factors of rank 0."""
    out, inside = entry.shape
    return np.zeros((0, inside)), np.zeros((out, 0))


def _factors(matrix: Array) -> tuple[Array, Array]:
    """Return u [rows, r] and v [r, columns] with u·v = the matrix, in fp64; r is its rank."""
    wide = widened(matrix)
    rows, columns = wide.shape
    u, sizes, v = np.linalg.svd(wide, full_matrices=False)
    rounding = max(rows, columns) * float(np.finfo(np.float32).eps)
    rank = int(np.count_nonzero(sizes > rounding * sizes.max(initial=0.0)))
    if rank < min(rows, columns):
        return u[:, :rank] * sizes[:rank], v[:rank]
    if columns <= rows:
        return wide, np.eye(columns)
    return np.eye(rows), wide


def _note(name: str, method: str, ranks: Mapping[str, int]) -> str:
    """Say which updates of a method are LoRA now, and of what rank."""
    lowest = min(ranks.values())
    highest = max(ranks.values())
    rank = str(lowest) if lowest == highest else f"{lowest} to {highest}"
    count = counted(len(ranks), f"{method} update")
    return f"{name}: {count} taken as exact LoRA of rank {rank} ({some(sorted(ranks))})"
