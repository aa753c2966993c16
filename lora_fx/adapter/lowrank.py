"""The low-rank update LowRank: its layout, ΔW = s·b·a, and its random initial factors.

Shapes: `a` [*batch, rank, in], `b` [*batch, out, rank]; ΔW in [*batch, out, in] order is
s·(b @ a), and `Layout` says how that lies in the stored parameter. Hu et al. 2021
(arXiv:2106.09685); rsLoRA's scale alpha/√rank is Kalajdzievski 2023 (arXiv:2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

# Pickles of older versions name FileLayer in this module.
from lora_fx.adapter.origin import OLDER_FIELDS, Origin, with_older_fields
from lora_fx.adapter.origin import FileLayer as FileLayer
from lora_fx.dtypes import Array, NumpyDtype, factor_dtype
from lora_fx.inputs import generator
from lora_fx.ir.factor_product import product
from lora_fx.ir.layout import Layout
from lora_fx.text import short


@with_older_fields
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
            them (`lora_fx.adapter.dora` has the stored axis by op). None for others.
        frozen: How many of the last ranks do not train. They are what a start from W or its
            gradient takes off, so that the base stays as it is.
        mutated: The start (pissa, olora, kasa) that took its part off the base which the update
            is for; see `lora_fx.adapter.residual`. Empty for the base as it is.
        origin: Facts of its file or its model about the tensor. No arithmetic reads them.
        variant_tensors: Tensors of which its variant makes a and b, by field (numbers are arrays
            without axes); see `lora_fx.adapter.variant_protocol`. Empty where these are a and b
            themselves.
    """

    a: Array
    b: Array
    alpha: float
    layout: Layout | None = None
    variant: str = "lora"
    use: str = ""
    magnitude: Array | None = None
    frozen: int = 0
    mutated: str = field(default="", compare=False)
    origin: Origin = field(default_factory=Origin, compare=False)
    variant_tensors: Mapping[str, Array] = field(default_factory=dict, compare=False)

    __repr__ = short

    def __setstate__(self, state: Mapping[str, object]) -> None:
        """Restore a pickle; an old one lacks `variant_tensors` and has QA-LoRA's group as a field.

        A pickle from before `origin` has the facts of `origin` as fields.
        """
        fields: dict[str, Any] = dict(state)
        group = fields.pop("group", 0)
        tensors = {"group": np.asarray(group)} if group else {}
        facts = {name: fields.pop(name) for name in OLDER_FIELDS if name in fields}
        self.__dict__.update({"variant_tensors": tensors, "origin": Origin(**facts), **fields})

    @property
    def rank(self) -> int:
        """The rank: columns of b."""
        return int(self.b.shape[-1])

    @property
    def scale(self) -> float:
        """The scale: alpha/rank, or alpha/√rank for rslora."""
        return scale_of(self.alpha, self.rank, self.variant)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [*batch, out, in] of ΔW."""
        return (*self.b.shape[:-1], int(self.a.shape[-1]))

    @property
    @np.errstate(over="ignore", invalid="ignore")
    def norm(self) -> float:
        """‖s·BA‖ in Frobenius norm, without forming BA: its square is s² Σ (AAᵀ ∘ BᵀB)."""
        a = self.a.astype(np.float64)
        b = self.b.astype(np.float64)
        a_gram = a @ np.swapaxes(a, -1, -2)
        b_gram = np.swapaxes(b, -1, -2) @ b
        square = np.sum(a_gram * b_gram)
        return float(abs(self.scale) * np.sqrt(max(square, 0.0)))

    def block(self, batch: int, rows: slice, columns: slice, out: Array | None = None) -> Array:
        """Return the rectangle [rows, columns] of one matrix of ΔW, in the dtype of a and b.

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
        """Return ΔW = s·b@a as [*batch, out, in], in `dtype`; complex for complex factors."""
        if np.iscomplexobj(self.a):
            dtype = np.result_type(dtype, self.a.dtype)
        product = np.matmul(self.b.astype(dtype), self.a.astype(dtype))
        return np.asarray(product * np.asarray(self.scale, dtype))


Updates = Mapping[str, LowRank]
"""Target key → its update."""
Factors = tuple[Array, Array]
"""The factors a [*batch, rank, in] and b [*batch, out, rank]."""


@dataclass(frozen=True)
class Full:
    """A whole tensor that trains together with the low-rank updates (PEFT's modules_to_save).

    Attributes:
        value: The tensor.
        tied: True where it is for all names of a tensor that several modules share. A file of PEFT
            saves the tensor of one module, and so means that name alone.
        twins: The other names of such a tensor, where they are known.
    """

    value: Array
    tied: bool = field(default=False, compare=False)
    twins: tuple[str, ...] = field(default=(), compare=False)

    __repr__ = short


def scale_of(alpha: float, rank: int, variant: str = "lora") -> float:
    """Return the factor before b @ a: alpha/√rank for rslora, else alpha/rank, as in PEFT."""
    if variant == "rslora":
        return alpha / math.sqrt(rank)
    return alpha / rank


def alpha_of(scale: float, rank: int, variant: str = "lora") -> float:
    """Return the alpha that gives this scale; the inverse of `scale_of`."""
    if variant == "rslora":
        return scale * math.sqrt(rank)
    return scale * rank


def draw(
    key: str, layout: Layout, rank: int, seed: int, which: str = "kaiming", dtype: str = "float32"
) -> Factors:
    """Return initial a and b for one target, from a random generator that is used for it alone.

    They are fp32, and complex64 for a `dtype` of complex numbers: both parts are drawn, with the
    variance of a real number in all.

    The numbers depend on (seed, key) only, never on the order of targets or on global state.
    kaiming: a uniform in ±1/√in (PEFT's kaiming_uniform with a=√5), b zero. probe: both normal,
    a with variance 1/in and b with variance 1/rank, for proofs of effect.
    """
    rng = generator(key, seed)
    a_shape, b_shape = layout.factor_shapes(rank)
    kind = factor_dtype(dtype)
    if which == "probe":
        a = of_parts(rng.standard_normal, a_shape, kind) / math.sqrt(layout.in_size)
        b = of_parts(rng.standard_normal, b_shape, kind) / math.sqrt(rank)
        return a.astype(kind), b.astype(kind)
    bound = 1.0 / math.sqrt(layout.in_size)
    a = of_parts(lambda size: rng.uniform(-bound, bound, size), a_shape, kind)
    return a.astype(kind), np.zeros(b_shape, kind)


def of_parts(
    sample: Callable[[Sequence[int]], Array], shape: Sequence[int], kind: NumpyDtype
) -> Array:
    """Return random numbers in double precision: x, or (x + iy)/√2 for a complex kind."""
    real = sample(shape)
    if kind.kind != "c":
        return real
    return (real + 1j * sample(shape)) / math.sqrt(2)
