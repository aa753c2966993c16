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
    """Mix several updates of one key, each with a weight; see the table above.

    Args:
        key: The key, for messages.
        pairs: (update, weight).
        how: cat, svd or linear.
        rank: The rank of an svd mix; the largest of the updates where none is given.

    Raises:
        LoraFxError: They are of different weights or uses, or have unequal ranks in a linear mix.
    """
    first, _ = pairs[0]
    for low, _ in pairs[1:]:
        _check_fits(key, first, low)
    if how == "linear":
        return _linear(key, pairs)

    a = np.concatenate([low.a for low, _ in pairs], axis=-2)
    b = np.concatenate([low.b * np.float32(weight * low.scale) for low, weight in pairs], axis=-1)
    if how == "svd":
        a, b = truncated(a, b, rank or max(low.rank for low, _ in pairs))
    return replace(first, a=a, b=b, alpha=float(b.shape[-1]), variant="lora", frozen=0)


def _check_fits(key: str, first: LowRank, low: LowRank) -> None:
    """Raise where two updates are not of the same weight and use."""
    in_size = first.a.shape[-1]
    out_size = first.b.shape[-2]
    same_shape = (low.a.shape[-1], low.b.shape[-2]) == (in_size, out_size)
    if same_shape and (low.layout, low.use) == (first.layout, first.use):
        return
    raise LoraFxError(
        f"the updates of {key!r} have different shapes or layouts: in {in_size}, out {out_size} "
        f"and in {low.a.shape[-1]}, out {low.b.shape[-2]}",
        "bind both to the same model first",
    )


def _linear(key: str, pairs: Sequence[Pair]) -> LowRank:
    """The weighted sums of the factors, each with the root of its scale."""
    first, _ = pairs[0]
    ranks = {low.rank for low, _ in pairs}
    if len(ranks) > 1:
        raise LoraFxError(
            f"a linear mix needs equal ranks; {key!r} has {sorted(ranks)}", "use cat or svd"
        )
    a = np.zeros_like(first.a)
    b = np.zeros_like(first.b)
    for low, weight in pairs:
        factor = weight * low.scale
        root = math.sqrt(abs(factor))
        a = a + low.a * np.float32(math.copysign(root, factor))
        b = b + low.b * np.float32(root)
    return replace(first, a=a, b=b, alpha=float(first.rank), variant="lora", frozen=0)
