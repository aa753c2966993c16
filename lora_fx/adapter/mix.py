"""Mixes of updates: one update that is a weighted sum of others.

cat      a = [a₁; a₂; …], b = [w₁s₁b₁, w₂s₂b₂, …]: exact, the ranks add up
svd      the best approximation of Σ wᵢsᵢbᵢaᵢ of a given rank (Eckart and Young 1936)
linear   a = Σ ±√|wᵢsᵢ| aᵢ, b = Σ √|wᵢsᵢ| bᵢ: PEFT's linear, equal ranks; not the weighted sum of
the changes, since it has cross terms bᵢaⱼ
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.svd import truncated
from lora_fx.errors import LoraFxError

HOWS = ("cat", "svd", "linear")


Pair = tuple[LowRank, float]


def mixed_update(key: str, pairs: Sequence[Pair], how: str, rank: int | None) -> LowRank:
    """One update from several, each with a weight."""
    first = pairs[0][0]
    for u, _ in pairs[1:]:
        same = u.a.shape[-1] == first.a.shape[-1] and u.b.shape[-2] == first.b.shape[-2]
        if (u.layout, u.use) != (first.layout, first.use) or not same:
            raise LoraFxError(
                f"the updates of {key!r} do not fit each other: in {first.a.shape[-1]}, out "
                f"{first.b.shape[-2]} and in {u.a.shape[-1]}, out {u.b.shape[-2]}",
                "bind both to the same model first",
            )
    if how == "linear":
        return _linear(key, pairs)
    a = np.concatenate([u.a for u, _ in pairs], axis=-2)
    b = np.concatenate([u.b * np.float32(w * u.scale) for u, w in pairs], axis=-1)
    if how == "svd":
        a, b = truncated(a, b, rank or max(u.rank for u, _ in pairs))
    return replace(first, a=a, b=b, alpha=float(b.shape[-1]), variant="lora", frozen=0)


def _linear(key: str, pairs: Sequence[Pair]) -> LowRank:
    first = pairs[0][0]
    ranks = {u.rank for u, _ in pairs}
    if len(ranks) > 1:
        raise LoraFxError(
            f"a linear mix needs equal ranks; {key!r} has {sorted(ranks)}", "use cat or svd"
        )
    a, b = np.zeros_like(first.a), np.zeros_like(first.b)
    for u, w in pairs:
        root = math.sqrt(abs(w * u.scale))
        a = a + u.a * np.float32(math.copysign(root, w * u.scale))
        b = b + u.b * np.float32(root)
    return replace(first, a=a, b=b, alpha=float(first.rank), variant="lora", frozen=0)
