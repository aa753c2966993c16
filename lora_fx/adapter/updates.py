"""The changes that an adapter can make to one stored tensor, besides LowRank and Full.

ΔW lies in [*batch, out, in] order, as for LowRank, and any rectangle of it can be had without the
rest: that is what lets a merge stream. `batch` is always empty here.

============  =========================================  =========================================
Hadamard      ΔW = s · (b₁a₁ ∘ b₂a₂)                     LoHa, Hyeon-Woo et al. 2021 (2108.06098)
Kronecker     ΔW = s · w₁ ⊗ w₂                           LoKr, Yeh et al. 2023 (2309.14859)
Dense         ΔW = s · value, given in full              PEFT's lora_bias, kohya's .diff
Rotation      ΔW = W · (R − 1)ᵀ, R of orthogonal blocks  OFT, Qiu et al. 2023 (2306.07280)
ReplacedRows  W[index] = value                           PEFT's trainable tokens
============  =========================================  =========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.variant import VARIANTS, variant_of
from lora_fx.dtypes import Array
from lora_fx.ir.layout import Layout
from lora_fx.text import short


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

    __repr__ = short

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
        """A rectangle of ΔW, as `LowRank.block` gives it; there is one matrix."""
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

    __repr__ = short

    @property
    def shape(self) -> tuple[int, ...]:
        """[o1·o2, i1·i2]."""
        o1, i1 = self.w1.shape
        o2, i2 = self.w2.shape
        return (o1 * o2, i1 * i2)

    def block(self, batch: int, rows: slice, columns: slice) -> Array:
        """A rectangle of ΔW, as `LowRank.block` gives it; there is one matrix."""
        row_numbers = np.arange(self.shape[0])[rows]
        o2 = self.w2.shape[0]
        w1_rows = self.w1[row_numbers // o2]
        w2_rows = self.w2[row_numbers % o2]
        product = w1_rows[:, :, None] * w2_rows[:, None, :]
        block = product.reshape(len(row_numbers), -1)[:, columns]
        return np.asarray(block * block.dtype.type(self.scale))


@dataclass(frozen=True)
class Dense:
    """ΔW = scale · value; `value` [out, in], or [out] for a bias, fp32."""

    value: Array
    scale: float = 1.0
    layout: Layout | None = None

    __repr__ = short

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]; in is 1 for a bias."""
        return (self.value.shape[0], self.value[0].size)

    def block(self, batch: int, rows: slice, columns: slice) -> Array:
        """A rectangle of ΔW, as `LowRank.block` gives it; there is one matrix."""
        flat = self.value.reshape(self.shape)
        return np.asarray(flat[rows, columns] * flat.dtype.type(self.scale))


@dataclass(frozen=True)
class Rotation:
    """ΔW = W · turnᵀ, turn = R − 1 of blocks along in: it depends on W, as DoRA's does.

    Attributes:
        turn: [blocks, size, size], fp32; a single block where it is `shared`.
        shared: True where a single block stands all along in.
        layout: The layout of a weight stored [out, *in]; None while unbound.
    """

    turn: Array
    shared: bool = False
    layout: Layout | None = None
    scale: ClassVar[float] = 1.0

    __repr__ = short

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]; 0 stands for a size that only the base has."""
        out_size = self.layout.out_size if self.layout else 0
        if not self.shared:
            return (out_size, len(self.turn) * self.turn.shape[-1])
        return (out_size, self.layout.in_size if self.layout else 0)

    def fits(self, in_: int) -> bool:
        """True where W can have this many columns."""
        if not self.shared:
            return in_ == self.shape[1]
        block_size = int(self.turn.shape[-1])
        return in_ % block_size == 0

    def of(self, weight: Array) -> Array:
        """ΔW of some rows of W [n, in], in W's dtype."""
        blocks = weight.reshape(len(weight), -1, self.turn.shape[-1]).swapaxes(0, 1)
        turn_transposed = self.turn.swapaxes(1, 2).astype(weight.dtype, copy=False)
        delta = np.matmul(blocks, turn_transposed)
        return np.asarray(delta.swapaxes(0, 1).reshape(weight.shape))


@dataclass(frozen=True)
class ReplacedRows:
    """Single rows of a tensor, trained and stored whole: W[index[i]] = value[i]."""

    index: tuple[int, ...]
    value: Array

    __repr__ = short


Change = LowRank | Hadamard | Kronecker | Dense | Rotation
"""A ΔW of `shape`, whose rectangles can be computed one by one, by `block`, with `scale` in them.

Those of a Rotation are made of W's, by `of`.

`layout` says how it lies in the stored tensor; None while unbound.
"""
Entry = Change | Full | ReplacedRows
"""An update, or a replacement, that an adapter can hold under a key."""


def is_tied(entry: Entry) -> bool:
    """True for an update of all uses of a tensor that several modules share."""
    if isinstance(entry, LowRank):
        return entry.origin.tied
    return isinstance(entry, Full) and entry.tied


def twins_of(entry: Entry) -> tuple[str, ...]:
    """Other names of the tensor of an update, where they are known."""
    if isinstance(entry, LowRank):
        return entry.origin.twins
    if isinstance(entry, Full):
        return entry.twins
    return ()


def is_plain(entry: Entry) -> bool:
    """True for a whole tensor or s·b·a on the unchanged base: what a graph can hold."""
    if isinstance(entry, LowRank) and variant_of(entry).reads_weight:
        return False
    return is_on_base(entry)


def is_on_base(entry: Entry) -> bool:
    """True for a whole tensor, or a low-rank update of one tensor of the unchanged base."""
    if isinstance(entry, LowRank):
        return not entry.mutated and not entry.origin.candidates
    return isinstance(entry, Full)


_NAMES: Mapping[type[object], str] = {
    Hadamard: "LoHa",
    Kronecker: "LoKr",
    Rotation: "OFT",
    Dense: "a whole ΔW",
    ReplacedRows: "trained rows",
}


def name_of(entry: Entry) -> str:
    """The usual name of an entry (LoHa, DoRA …), for messages."""
    if isinstance(entry, LowRank):
        if entry.mutated:
            return f"for a base that {entry.mutated} changed"
        if entry.origin.candidates:
            return f"for one of the parameters {', '.join(entry.origin.candidates)}"
        if entry.variant.partition(":")[0] not in VARIANTS:  # of a pickle of another process
            return entry.variant
        variant = variant_of(entry)
        if variant.reads_weight and variant.title:
            return variant.title
        return entry.variant
    return _NAMES.get(type(entry), "a whole tensor")
