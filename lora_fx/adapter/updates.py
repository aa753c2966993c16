"""The changes that an adapter can make to one stored tensor, beside LowRank and Full.

ΔW lies in [*batch, out, in] order, as for LowRank, and any rectangle of it can be had without the
rest: that is what lets a merge stream. `batch` is always empty here.

============  =========================================  =========================================
Hadamard      ΔW = s · (b₁a₁ ∘ b₂a₂)                     LoHa, Hyeon-Woo et al. 2021 (2108.06098)
Kronecker     ΔW = s · w₁ ⊗ w₂                           LoKr, Yeh et al. 2023 (2309.14859)
Dense         ΔW = s · value, given in full              PEFT's lora_bias, kohya's .diff
ReplacedRows  W[index] = value                           PEFT's trainable tokens
============  =========================================  =========================================
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.dtypes import Array
from lora_fx.ir.layout import Layout


class Change(Protocol):
    """A ΔW whose rectangles can be computed one by one; LowRank is one too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[*batch, out, in] of ΔW."""
        ...

    @property
    def layout(self) -> Layout | None:
        """How ΔW lies in the stored tensor; None while unbound."""
        ...

    @property
    def scale(self) -> float:
        """The factor that `block` has multiplied in."""
        ...

    def block(self, batch: int, rows: slice, columns: slice) -> Array:
        """A rectangle of one matrix of ΔW, s included, in the factors' dtype.

        `batch` counts all batch axes.
        """
        ...


@dataclass(frozen=True)
class Hadamard:
    """ΔW = scale · (b1 @ a1) ∘ (b2 @ a2); a [r, in], b [out, r], fp32; kernel of a convolution."""

    a1: Array
    b1: Array
    a2: Array
    b2: Array
    alpha: float
    layout: Layout | None = None
    kernel: tuple[int, ...] = field(default=(), compare=False)

    @property
    def rank(self) -> int:
        """Columns of b1."""
        return int(self.b1.shape[-1])

    @property
    def scale(self) -> float:
        """alpha/rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return (self.b1.shape[0], self.a1.shape[1])

    def block(self, batch: int, rows: slice, columns: slice) -> Array:
        """See Change."""
        first = np.matmul(self.b1[rows], self.a1[:, columns])
        second = np.matmul(self.b2[rows], self.a2[:, columns])
        return np.asarray(first * second * first.dtype.type(self.scale))


@dataclass(frozen=True)
class Kronecker:
    """ΔW = scale · w1 ⊗ w2; w1 [o1, i1], w2 [o2, i2], fp32. A kernel belongs to w2's i2."""

    w1: Array
    w2: Array
    scale: float
    layout: Layout | None = None
    kernel: tuple[int, ...] = field(default=(), compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """[o1·o2, i1·i2]."""
        (o1, i1), (o2, i2) = self.w1.shape, self.w2.shape
        return (o1 * o2, i1 * i2)

    def block(self, batch: int, rows: slice, columns: slice) -> Array:
        """See Change."""
        at = np.arange(self.shape[0])[rows]
        o2 = self.w2.shape[0]
        whole = self.w1[at // o2][:, :, None] * self.w2[at % o2][:, None, :]
        return np.asarray(whole.reshape(len(at), -1)[:, columns] * whole.dtype.type(self.scale))


@dataclass(frozen=True)
class Dense:
    """ΔW = scale · value; `value` [out, in], or [out] for a bias, fp32."""

    value: Array
    scale: float = 1.0
    layout: Layout | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]; in is 1 for a bias."""
        return (self.value.shape[0], self.value[0].size)

    def block(self, batch: int, rows: slice, columns: slice) -> Array:
        """See Change."""
        flat = self.value.reshape(self.shape)
        return np.asarray(flat[rows, columns] * flat.dtype.type(self.scale))


@dataclass(frozen=True)
class ReplacedRows:
    """Single rows of a tensor, trained and stored whole: W[index[i]] = value[i]."""

    index: tuple[int, ...]
    value: Array


Entry = LowRank | Full | Hadamard | Kronecker | Dense | ReplacedRows
"""Whatever an adapter can hold under a key."""


def is_plain(entry: Entry) -> bool:
    """True for a whole tensor or s·b·a on the base as it is: what a graph can hold."""
    if isinstance(entry, LowRank):
        return entry.magnitude is None and not entry.mutated and not entry.candidates
    return isinstance(entry, Full)


def name_of(entry: Entry) -> str:
    """What the field calls an entry (LoHa, DoRA …), for messages."""
    if isinstance(entry, LowRank):
        if entry.mutated:
            return f"meant for a base that {entry.mutated} changed"
        if entry.candidates:
            return f"of one of the parameters {', '.join(entry.candidates)}"
        return "DoRA" if entry.magnitude is not None else entry.variant
    names = {Hadamard: "LoHa", Kronecker: "LoKr", Dense: "a whole ΔW", ReplacedRows: "trained rows"}
    return names.get(type(entry), "a whole tensor")
