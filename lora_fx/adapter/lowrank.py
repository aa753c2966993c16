"""The low-rank update, once: layout, ΔW = s·b·a, and the best of them.

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
from lora_fx.dtypes import Array, NumpyDtype, factor_dtype, widened
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
            them (`lora_fx.adapter.variant` has the stored axis by op). None for others.
        frozen: How many of the last ranks do not train. They are what a start from W or its
            gradient takes off, so that the base stays as it is.
        mutated: The start (pissa, olora, kasa) that took its part off the base which the update
            is for; see `lora_fx.adapter.variant.residual`. Empty for the base as it is.
        origin: What its file or its model says of the tensor. No arithmetic reads it.
        variant_tensors: What its variant makes a and b of, by field (numbers are arrays without
            axes); see `lora_fx.adapter.base`. Empty where these are a and b themselves.
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
        """Take a pickle; an older one has no `variant_tensors`, and QA-LoRA's group as a field.

        One that is older than `origin` has its facts as fields.
        """
        fields: dict[str, Any] = dict(state)
        group = fields.pop("group", 0)
        tensors = {"group": np.asarray(group)} if group else {}
        older = {name: fields.pop(name) for name in OLDER_FIELDS if name in fields}
        self.__dict__.update({"variant_tensors": tensors, "origin": Origin(**older), **fields})

    @property
    def rank(self) -> int:
        """Columns of b."""
        return int(self.b.shape[-1])

    @property
    def scale(self) -> float:
        """alpha/rank, or alpha/√rank for rslora."""
        return scale_of(self.alpha, self.rank, self.variant)

    @property
    def shape(self) -> tuple[int, ...]:
        """[*batch, out, in] of ΔW."""
        return (*self.b.shape[:-1], int(self.a.shape[-1]))

    @property
    @np.errstate(over="ignore", invalid="ignore")
    def norm(self) -> float:
        """‖s·BA‖ in Frobenius norm, without BA: its square is s² Σ (AAᵀ ∘ BᵀB)."""
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        square = np.sum((a @ np.swapaxes(a, -1, -2)) * (np.swapaxes(b, -1, -2) @ b))
        return float(abs(self.scale) * np.sqrt(max(square, 0.0)))

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
        """The whole ΔW = s·b@a as [*batch, out, in], computed in `dtype`, or its complex twin."""
        if np.iscomplexobj(self.a):
            dtype = np.result_type(dtype, self.a.dtype)
        product = np.matmul(self.b.astype(dtype), self.a.astype(dtype))
        return np.asarray(product * np.asarray(self.scale, dtype))


Updates = Mapping[str, LowRank]
"""Target key → its update."""
Factors = tuple[Array, Array]
"""a [*batch, rank, in] and b [*batch, out, rank]."""


@dataclass(frozen=True)
class Full:
    """A whole tensor trained beside the low-rank updates (PEFT's modules_to_save).

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
    """The factor before b @ a: alpha/√rank for rslora, else alpha/rank, as PEFT has it."""
    return alpha / math.sqrt(rank) if variant == "rslora" else alpha / rank


def alpha_of(scale: float, rank: int, variant: str = "lora") -> float:
    """The alpha that gives this scale; the inverse of `scale_of`."""
    return scale * (math.sqrt(rank) if variant == "rslora" else rank)


def draw(
    key: str, layout: Layout, rank: int, seed: int, which: str = "kaiming", dtype: str = "float32"
) -> Factors:
    """Initial a and b for one target, from a generator of its own.

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
    """Drawn numbers in double precision: x, or (x + iy)/√2 for a complex kind."""
    real = sample(shape)
    return (real + 1j * sample(shape)) / math.sqrt(2) if kind.kind == "c" else real


# Best low-rank approximations (Eckart and Young 1936) of products b @ a and of given matrices.
#
# A product b @ a of rank k needs no SVD of the whole: b = Q₁R₁, aᵀ = Q₂R₂, and R₁R₂ᵀ is k × k.
#
# A matrix Δ is reduced to QᵀΔ with an orthonormal Q of l columns: its SVD gives the factors. Where
# the short side is small, Q are leading eigenvectors of ΔΔᵀ in fp64, which is exact; else Q spans
# (ΔΔᵀ)²ΔΩ of a random Ω, re-orthogonalised after every product (Halko, Martinsson and Tropp 2011,
# arXiv:0909.4061, algorithms 4.4 and 5.1). Whatever Q is, ‖Δ − Q(QᵀΔ)ᵣ‖² = ‖Δ‖² − Σᵢ≤ᵣ σᵢ(QᵀΔ)².


TRACY_WIDOM = 2.02
"""The 99 % point of the Tracy-Widom distribution of order 1."""

Triplets = tuple[Array, Array, Array]
"""u [*batch, out, k], s [*batch, k] in descending order, vt [*batch, k, in]."""

EXACT_SIDE = 512
"""Matrices whose short side is at most this are not sampled."""

OVERSAMPLING = 2
"""Columns that are sampled beyond the rank, as a multiple of it."""

ITERATIONS = 2
"""Power iterations; without any, the error is a third above the optimum on noisy spectra."""

BLOCK = 1 << 18
"""Elements of a block that is widened to fp64 at a time."""


def product_svd(a: Array, b: Array) -> Triplets:
    """The SVD of b @ a in fp64; a [*batch, r, in], b [*batch, out, r]."""
    qb, rb = np.linalg.qr(widened(b))
    qa, ra = np.linalg.qr(np.swapaxes(widened(a), -1, -2))
    u, s, vt = np.linalg.svd(rb @ np.swapaxes(ra, -1, -2), full_matrices=False)
    return qb @ u, s, vt @ np.swapaxes(qa, -1, -2)


def product_values(a: Array, b: Array) -> Array:
    """The singular values of b @ a alone, [*batch, k] in descending order, in fp64."""
    rb = np.linalg.qr(widened(b), mode="r")
    ra = np.linalg.qr(np.swapaxes(widened(a), -1, -2), mode="r")
    return np.asarray(np.linalg.svd(rb @ np.swapaxes(ra, -1, -2), compute_uv=False))


def balanced(u: Array, s: Array, vt: Array, rank: int) -> Factors:
    """√S·Vᵀ as a and U·√S as b, of the first `rank` triplets, in fp32 or complex64."""
    root = np.sqrt(s[..., :rank])
    a, b = root[..., :, None] * vt[..., :rank, :], u[..., :rank] * root[..., None, :]
    kind = factor_dtype(a.dtype.name)
    return a.astype(kind), b.astype(kind)


def truncated(a: Array, b: Array, rank: int) -> Factors:
    """The best a, b of at most `rank` for b @ a."""
    u, s, vt = product_svd(a, b)
    return balanced(u, s, vt, min(rank, s.shape[-1]))


def distance(a1: Array, b1: Array, a2: Array, b2: Array) -> float:
    """‖b1 @ a1 − b2 @ a2‖_F over all batches, without forming a product, in fp64."""
    b = np.concatenate([widened(b1), -widened(b2)], axis=-1)
    a = np.concatenate([widened(a1), widened(a2)], axis=-2)
    rb = np.linalg.qr(b, mode="r")
    ra = np.linalg.qr(np.swapaxes(a, -1, -2), mode="r")
    return float(np.linalg.norm(rb @ np.swapaxes(ra, -1, -2)))


def leading(delta: Array, k: int, rng: np.random.Generator) -> Triplets:
    """The first min(k, out, in) triplets of one matrix [out, in], in fp64.

    Args:
        delta: fp32 or fp64; products are in its dtype.
        k: How many triplets.
        rng: Draws the random subspace; not used where the result is exact.
    """
    # the Gram matrix is that of the shorter side
    if delta.shape[0] > delta.shape[1]:
        v, s, ut = leading(delta.T, k, rng)
        return ut.T, s, v.T
    side = delta.shape[0]
    k = min(k, side)
    if side <= max(EXACT_SIDE, 2 * OVERSAMPLING * k):
        q = _eigenvectors(delta, k)
        blocks = _blocks(delta.shape[1], side)
        small = np.concatenate([q.T @ delta[:, c].astype(np.float64) for c in blocks], axis=1)
    else:
        q = _sampled(delta, (1 + OVERSAMPLING) * k, rng)
        small = (q.T.astype(delta.dtype) @ delta).astype(np.float64)
    u, s, vt = np.linalg.svd(small, full_matrices=False)
    return (q @ u)[:, :k], s[:k], vt[:k]


def squared_distance(delta: Array, a: Array, b: Array) -> float:
    """‖delta − b @ a‖² element by element in fp64, by blocks of rows."""
    total = 0.0
    wide = a.astype(np.float64)
    for rows in _blocks(*delta.shape):
        gap = delta[rows] - b[rows].astype(np.float64) @ wide
        total += float(np.vdot(gap, gap))
    return total


def above_noise(s: Array, total: float, shape: tuple[int, int]) -> int:
    """How many singular values are larger than those of white noise.

    The largest one of noise of variance τ² on m × n is near τ(√m + √n), the edge of Marchenko and
    Pastur (1967), with the distribution of Tracy and Widom (Johnstone 2001,
    doi:10.1214/aos/1009210544), of which the 99 % point is taken. τ² is the energy per element
    that the values above leave, so the count is a fixed point.

    Args:
        s: The leading singular values, descending.
        total: ‖Δ‖² of the whole matrix.
        shape: (m, n).
    """
    above = 0
    while above < len(s):
        m, n = shape[0] - above, shape[1] - above
        rest = max(0.0, total - float(np.sum(s[:above] ** 2)))
        root_m, root_n = np.sqrt(m), np.sqrt(max(n - 1, 1))
        spread = (root_m + root_n) * (1 / root_m + 1 / root_n) ** (1 / 3)
        edge = rest / (m * n) * ((root_m + root_n) ** 2 + TRACY_WIDOM * spread)
        found = int(np.count_nonzero(s**2 > edge))
        if found <= above:
            break
        above = found
    return above


def _blocks(count: int, width: int) -> list[slice]:
    """Slices of `count` rows, or columns, of `width` elements: BLOCK elements at a time."""
    step = max(1, BLOCK // width)
    return [slice(i, i + step) for i in range(0, count, step)]


def _eigenvectors(delta: Array, k: int) -> Array:
    """The k leading left singular vectors of [m, n], m ≤ n, from ΔΔᵀ in fp64."""
    m, n = delta.shape
    gram = np.zeros((m, m))
    for columns in _blocks(n, m):
        block = delta[:, columns].astype(np.float64)
        gram += block @ block.T
    _, vectors = np.linalg.eigh(gram)
    return np.asarray(vectors[:, ::-1][:, :k])


def _sampled(delta: Array, count: int, rng: np.random.Generator) -> Array:
    """An orthonormal [m, count] that nearly holds the leading left singular vectors."""
    omega = rng.standard_normal((delta.shape[1], count), dtype=np.float32).astype(delta.dtype)
    q, _ = np.linalg.qr(delta @ omega)
    for _ in range(ITERATIONS):
        # orthogonal again after every product, or small σ drown in the rounding of large ones
        q, _ = np.linalg.qr(delta.T @ q.astype(delta.dtype))
        q, _ = np.linalg.qr(delta @ q.astype(delta.dtype))
    return np.asarray(q, np.float64)
