"""The maths of a low-rank update, once: layout, ΔW = s·b·a, and its initial values.

Shapes: `a` [*batch, rank, in], `b` [*batch, out, rank]; ΔW in [*batch, out, in] order is
s·(b @ a), and `Layout` says how that lies in the stored parameter. Hu et al. 2021
(arXiv:2106.09685); rsLoRA's scale alpha/√rank is Kalajdzievski 2023 (arXiv:2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lora_fx.dtypes import Array
from lora_fx.inputs import generator
from lora_fx.ir.layout import Layout
from lora_fx.ir.numpy_emitter import product
from lora_fx.text import short


@dataclass(frozen=True)
class FileLayer:
    """Where a file has an update that does not say by its key alone what it is of.

    PEFT puts an update of a parameter (a stack of experts, say) into a layer around the module that
    holds it, one in another for several parameters, and does not say which is which.

    Attributes:
        lead: The file's name of the layer.
        of: How many layers there are around the module; 0 where it is none of these.
        module: The module, where the key does not name a parameter.
        depth: How many of the layers lie around this one.
        candidates: Leaf name of each parameter that it may be → (rank, alpha) that it has then.
    """

    lead: str
    of: int = 0
    module: str = ""
    depth: int = 0
    candidates: Mapping[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class LowRank:
    """One low-rank update ΔW = scale · b @ a.

    Attributes:
        a: [*batch, rank, in], fp32 master.
        b: [*batch, out, rank], fp32 master.
        alpha: Numerator of the scale.
        layout: How [*batch, out, in] lies in the stored tensor; None while unbound.
        variant: A name of lora_fx.adapter.variant. The scale of rslora is alpha/√rank, that of
            every other alpha/rank.
        use: The use of a shared tensor that the update applies to; empty for all uses.
        magnitude: DoRA's row norms, [out]: rows of W + ΔW in [out, in] order are rescaled to
            them (`lora_fx.adapter.variant` has the stored axis by op). None for others.
        frozen: How many of the last ranks do not train. They are what a start from W or its
            gradient takes off, so that the base stays as it is.
        op: The op that reads the weight (linear, addmm, conv2d, embedding, experts …), where that
            is known. in of an embedding is its rows.
        kernel: The kernel of a convolution, where it is known; in is C_in/groups · ∏kernel.
        tied: True where it applies to all uses of a tensor that several modules share.
        twins: Other names of that tensor in a file: what they name changes alike.
        mutated: The start (pissa, olora, kasa) that took its part off the base which the update
            is for; see `lora_fx.adapter.initial.residual`. Empty for the base as it is.
        layer: Where a file has it, for `lora_fx.adapter.fused.place` and for writing it again.
        group: How many inputs QA-LoRA reads as one, so that ΔW is constant over them; see
            `grouped`. 0 for other updates.
    """

    a: Array
    b: Array
    alpha: float
    layout: Layout | None = None
    variant: str = "lora"
    use: str = ""
    magnitude: Array | None = None
    frozen: int = 0
    op: str = field(default="", compare=False)
    kernel: tuple[int, ...] = field(default=(), compare=False)
    tied: bool = field(default=False, compare=False)
    twins: tuple[str, ...] = field(default=(), compare=False)
    mutated: str = field(default="", compare=False)
    layer: FileLayer | None = field(default=None, compare=False)
    group: int = field(default=0, compare=False)

    __repr__ = short

    @property
    def rank(self) -> int:
        """Columns of b."""
        return int(self.b.shape[-1])

    @property
    def scale(self) -> float:
        """alpha/rank, or alpha/√rank for rslora."""
        return scale_of(self.alpha, self.rank, self.variant)

    @property
    def candidates(self) -> Mapping[str, tuple[int, float]]:
        """The parameters that it may be of, where its file does not say which; see FileLayer."""
        return self.layer.candidates if self.layer else {}

    @property
    def shape(self) -> tuple[int, ...]:
        """[*batch, out, in] of ΔW."""
        return (*self.b.shape[:-1], int(self.a.shape[-1]))

    @property
    def pooled(self) -> Array | None:
        """The a [*batch, rank, in/group] of which `grouped` makes this one; None for no such.

        Whoever rewrote a may have left the groups, so its numbers are asked.
        """
        return pooled(self.a, self.group)

    @property
    def asked(self) -> float:
        """The alpha as PEFT has it, which multiplies QA-LoRA's by in/group²."""
        if not self.group:
            return self.alpha
        # as a person wrote it, whatever the gain is
        return float(f"{self.alpha / _gain(self.a.shape[-1], self.group):.15g}")

    def block(self, batch: int, rows: slice, columns: slice, out: Array | None = None) -> Array:
        """The rectangle [rows, columns] of one matrix of ΔW, in the dtype of a and b.

        The product comes first and then the scale, as in PEFT: the order decides how it rounds.
        `batch` counts all batch axes, and `out` may be an array to compute in.
        """
        a = self.a.reshape(-1, *self.a.shape[-2:])[batch]
        b = self.b.reshape(-1, *self.b.shape[-2:])[batch]
        delta = product(b[rows], a[:, columns], out)
        if self.scale != 1.0:
            np.multiply(delta, delta.dtype.type(self.scale), out=delta)
        return delta

    def matrix(self, dtype: npt.DTypeLike = np.float64) -> Array:
        """The whole ΔW = s·b@a as [*batch, out, in], computed in `dtype`."""
        product = np.matmul(self.b.astype(dtype), self.a.astype(dtype))
        return np.asarray(product * np.asarray(self.scale, dtype))


@dataclass(frozen=True)
class Full:
    """A whole tensor trained beside the low-rank updates (PEFT's modules_to_save)."""

    value: Array

    __repr__ = short


def scale_of(alpha: float, rank: int, variant: str = "lora") -> float:
    """The factor before b @ a: alpha/√rank for rslora, else alpha/rank, as PEFT has it."""
    return alpha / math.sqrt(rank) if variant == "rslora" else alpha / rank


def alpha_of(scale: float, rank: int, variant: str = "lora") -> float:
    """The alpha that gives this scale; the inverse of `scale_of`."""
    return scale * (math.sqrt(rank) if variant == "rslora" else rank)


# QA-LoRA, Xu et al. 2023 (arXiv:2309.14717): an a that reads means of groups of inputs, so that ΔW
# is constant in each group, as the zero points of a quantised weight are.


def grouped(low: LowRank, group: int) -> LowRank:
    """The update of which QA-LoRA is given an a [*batch, rank, in/group].

    PEFT's QALoraLinearVariant takes in/group times the mean of each group, so that
    ΔW[o, i] = alpha/rank · in/group² · (b @ a)[o, i // group].
    """
    a = np.repeat(low.a, group, -1)
    return replace(low, a=a, alpha=low.alpha * _gain(a.shape[-1], group), group=group)


def pooled(a: Array, group: int) -> Array | None:
    """One column of a for each group of so many; None where those of a group differ."""
    if group < 1 or a.shape[-1] % group:
        return None
    wide = a.reshape(*a.shape[:-1], -1, group)
    return wide[..., 0] if (wide == wide[..., :1]).all() else None


def _gain(width: int, group: int) -> float:
    return width / group**2


def draw(
    key: str, layout: Layout, rank: int, seed: int, which: str = "kaiming"
) -> tuple[Array, Array]:
    """Initial a and b in fp32 for one target, from a generator of its own.

    The numbers depend on (seed, key) only, never on the order of targets or on global state.
    kaiming: a uniform in ±1/√in (PEFT's kaiming_uniform with a=√5), b zero. probe: both normal,
    a with variance 1/in and b with variance 1/rank, for proofs of effect.
    """
    rng = generator(key, seed)
    a_shape = (*layout.batch_shape, rank, layout.in_size)
    b_shape = (*layout.batch_shape, layout.out_size, rank)
    if which == "probe":
        a = rng.standard_normal(a_shape) / math.sqrt(layout.in_size)
        b = rng.standard_normal(b_shape) / math.sqrt(rank)
        return a.astype(np.float32), b.astype(np.float32)
    bound = 1.0 / math.sqrt(layout.in_size)
    a = rng.uniform(-bound, bound, a_shape)
    return a.astype(np.float32), np.zeros(b_shape, np.float32)
