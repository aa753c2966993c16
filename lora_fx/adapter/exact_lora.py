"""LoHa and LoKr as LoRA with the same ΔW, where their rank is below that of a whole matrix.

LoHa  (b₁a₁) ∘ (b₂a₂) = b·a of rank r², the variant loha, which trains on
LoKr  w₁ ⊗ w₂ = (u₁ ⊗ u₂)(v₁ ⊗ v₂) of rank r₁·r₂, where w = u·v has the rank r

Nothing is approximated: products are computed in fp64 and rounded once to fp32, those of LoHa in
fp32, as its training computes them. The rank of w₁ and w₂ is that of their fp32 numbers, in which
the product of two factors of rank r has rank r but for its rounding. A LoKr that has no such form
is `lora_fx.adapter.as_lora`'s to approximate.
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
from lora_fx.adapter.variant import named_variant
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
    """Return the LoRA with the ΔW of a LoHa or LoKr; None for others, and a LoKr of no low rank."""
    if isinstance(entry, Hadamard):
        return _of_hadamard(entry)
    if isinstance(entry, Kronecker):
        return _of_kronecker(entry)
    return None


def has_low_rank(entry: Hadamard | Kronecker) -> bool:
    """Whether the exact LoRA has a rank below that of any matrix of this shape."""
    if isinstance(entry, Hadamard):
        return entry.rank**2 < min(entry.shape)
    return _of_kronecker(entry) is not None


def _of_hadamard(entry: Hadamard) -> LowRank:
    """Return a LoHa as an update of the variant loha, of rank r², however large that is."""
    values = {
        "hada_a1": entry.a1,
        "hada_b1": entry.b1,
        "hada_a2": entry.a2,
        "hada_b2": entry.b2,
    }
    empty = np.zeros((1, 1), np.float32)
    alpha = entry.scale * entry.rank**2
    origin = Origin(kernel=entry.kernel)
    low = LowRank(empty, empty, alpha, entry.layout, "loha", origin=origin)
    return named_variant("loha").with_values(low, values)


def _of_kronecker(entry: Kronecker) -> LowRank | None:
    """Return (u₁ ⊗ u₂)(v₁ ⊗ v₂) where its rank is low."""
    u1, v1 = _factors(entry.w1)
    u2, v2 = _factors(entry.w2)
    rank = len(v1) * len(v2)
    if not 0 < rank < min(entry.shape):
        return None
    a = np.kron(v1, v2).astype(np.float32)
    b = np.kron(u1, u2).astype(np.float32)
    origin = Origin(kernel=entry.kernel)
    return LowRank(a, b, entry.scale * rank, entry.layout, origin=origin)


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
