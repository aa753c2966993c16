"""The variants that insert trains: what each makes of W, how it learns, what it starts from.

=======  ==========================================  ==================  ========================
name     W'                                          trained             in PEFT's files
=======  ==========================================  ==================  ========================
lora     W + s·b·a, s = alpha/rank                   a, b                lora_A, lora_B
rslora   W + s·b·a, s = alpha/√rank                  a, b                … and use_rslora
dora     m/‖V‖ · V, V = W + s·b·a, s as of lora      a, b, magnitude m   … use_dora, magnitude
lora-fa  as lora                                     b                   as lora
lora+    as lora                                     b at 16 × the rate  as lora
qalora   as lora, ΔW constant over 32 inputs;        a of groups, b      … and use_qalora
         qalora:G over G
=======  ==========================================  ==================  ========================

lora: Hu et al. 2021 (2106.09685). rslora: Kalajdzievski 2023 (2312.03732). dora: Liu et al. 2024
(2402.09353). lora-fa: Zhang et al. 2023 (2308.03303). lora+: Hayou et al. 2024 (2402.12354).
qalora: Xu et al. 2023 (2309.14717).

A variant composes Kinds and knows no IR. Its tensors by name are `lora_fx.adapter.lowrank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np

from lora_fx.adapter.lowrank import (
    Factors,
    LowRank,
    alpha_of,
    draw,
    grouped,
    of_parts,
    scale_of,
)
from lora_fx.dtypes import Array, NumpyDtype, factor_dtype, widened
from lora_fx.errors import LoraFxError, MisfitError, expect_name
from lora_fx.inputs import generator
from lora_fx.ir.emitter import NumpyEmitter, Ops, V
from lora_fx.ir.layout import Layout
from lora_fx.targets.budget import Moments
from lora_fx.targets.plan import Entry, Plan
from lora_fx.targets.target import Found, Target, check_storable, own_use


@dataclass(frozen=True)
class Lora:
    """W + s·b·a; a variant with another W' is a class of its own.

    Attributes:
        name: The variant's name.
        ratio: The learning rate of b over that of a.
        branches: True when s·b·a can be added beside the op; False when the op has to read W'.
    """

    name: str
    ratio: float = 1.0
    branches: ClassVar[bool] = True

    def prepared(self, low: LowRank, weight: Array | None, where: str) -> LowRank:
        """The update with the tensors that this variant has beside a and b.

        Args:
            low: An update of this variant whose W' is still W.
            weight: The base weight as [*batch, out, in]; only dora reads it.
            where: The target, for messages.
        """
        return low

    def change(self, e: Ops[V], layout: Layout, w: V, delta: V, magnitude: V | None) -> V:
        """W' − W in the stored shape.

        Args:
            e: An emitter of any IR.
            layout: The layout of the update.
            w: The stored tensor, or the region that the update is for.
            delta: s·b·a in the same shape.
            magnitude: [*batch, out], where the update has one.
        """
        return delta

    def rates(self, lr: float) -> dict[str, float]:
        """The learning rate of each field of `lora_fx.adapter.lowrank`."""
        return {"a": lr, "b": lr * self.ratio, "magnitude": lr * self.ratio}


class Dora(Lora):
    """The rows of W + s·b·a are given lengths of their own, which are trained."""

    branches = False

    def prepared(self, low: LowRank, weight: Array | None, where: str) -> LowRank:
        """The magnitude starts at the lengths of W's own rows, so that W' = W.

        Raises:
            LoraFxError: A row of W is zero or not finite.
        """
        assert weight is not None
        wide = weight.reshape(-1, weight.shape[-1])
        sums = squares(wide)
        size = np.sqrt(sums).astype(np.float32)
        factors(size, sums, where)  # raises for a row that has no direction
        return replace(low, variant="lora", magnitude=size.reshape(weight.shape[:-1]))

    def change(self, e: Ops[V], layout: Layout, w: V, delta: V, magnitude: V | None) -> V:
        """m/‖V‖ · V − W."""
        new = rescaled(e, layout, e.op("add", w, delta), magnitude)
        return e.op("add", new, e.op("mul", w, -1.0))


@dataclass(frozen=True)
class QaLora(Lora):
    """Each column of a is that of a group of inputs, so that zero points of codes can hold ΔW.

    Attributes:
        group: Inputs of a group; whole blocks of the codes that it shall be folded into.
    """

    group: int = 32

    def prepared(self, low: LowRank, weight: Array | None, where: str) -> LowRank:
        """An a [*batch, rank, in/group] within ±1/√(in/group), as PEFT draws it.

        Raises:
            LoraFxError: The groups do not divide the inputs.
        """
        width = low.a.shape[-1]
        if width % self.group:
            raise LoraFxError(
                f"{where}: {width} inputs are no whole groups of {self.group}",
                f"exclude it, or --variant qalora:{math.gcd(width, self.group)}",
            )
        a = low.a[..., :: self.group] * np.float32(self.group**0.5)
        return grouped(replace(low, a=a, variant="lora"), self.group)


VariantName = Literal["lora", "rslora", "dora", "lora-fa", "lora+", "qalora"] | str
"""Those of VARIANTS; a text, since qalora may carry the size of its groups: qalora:32."""
VARIANTS: Mapping[str, Lora] = {
    v.name: v
    for v in (
        Lora("lora"),
        Lora("rslora"),  # its scale falls with √rank, so that high ranks learn as fast as low ones
        Dora("dora"),
        Lora("lora-fa"),  # a stays as it was drawn: neither its gradient nor x has to be kept
        Lora("lora+", ratio=16.0),
        QaLora("qalora"),
    )
}


def named_variant(name: str) -> Lora:
    """The variant of a name; LoraFxError where there is none."""
    kind, _, size = name.partition(":")
    if kind == "qalora" and size.isascii() and size.isdigit() and int(size):
        return QaLora(kind, group=int(size))
    expect_name(name, VARIANTS, "no variant", f"the variants are {', '.join(VARIANTS)}")
    return VARIANTS[name]


def variant_of(low: LowRank) -> Lora:
    """What an update is: one with a magnitude is DoRA's, whatever its scale."""
    return VARIANTS["dora"] if low.magnitude is not None else named_variant(low.variant)


# DoRA's rescaling of a weight, in blocks and in graphs. Liu et al. 2024 (arXiv:2402.09353).
#
# In [out, in] order V = W + s·b·a, and the new weight is diag(magnitude / ‖V‖) · V, where ‖V‖ is
# the norm of each row: over everything but out.
#
# ===========  ========================================  ===========================
# op           rows of V are                             stored axis of the magnitude
# ===========  ========================================  ===========================
# linear       outputs: W[o, :]                          0
# HF Conv1D    outputs; W is stored [in, out]            1
# convolution  output channels: W[o, :, …], all taps     0
# embedding    features; W is stored [rows, dim]         1
# ===========  ========================================  ===========================
#
# PEFT's order of operations, fp32: (W + s·b·a), its norm, magnitude / norm, the product; one
# rounding to W's dtype at the end. V is made from W as it is stored, widened to fp32.


def squares(block: Array) -> Array:
    """Sums of squares of the rows of a block of V, fp64 [rows]; those of column blocks add up.

    Args:
        block: [rows, columns] of V.
    """
    wide = widened(block)
    return np.asarray(np.einsum("ij,ij->i", wide, wide.conj()).real)


def factors(magnitude: Array, sums: Array, where: str) -> Array:
    """What the rows of V are multiplied by: magnitude / norm, [out], in the magnitude's dtype.

    Args:
        magnitude: The norms that the rows shall have, [out].
        sums: `squares` summed over all of in, [out].
        where: The weight, for messages.

    Raises:
        LoraFxError: The sizes differ, or a row of V is zero or not finite.
    """
    if magnitude.shape != sums.shape:
        raise MisfitError(
            f"{where}: the DoRA magnitude has {magnitude.size} numbers; the weight has "
            f"{sums.size} rows"
        )
    bad = np.flatnonzero(~(np.isfinite(sums) & (sums > 0)))
    if bad.size:
        raise LoraFxError(
            f"{where}: row {bad[0]} of W + ΔW is zero or not finite; DoRA divides by its norm",
            "was the adapter trained on this model?",
        )
    return np.asarray(magnitude / np.sqrt(sums).astype(magnitude.dtype))


def rescaled(e: Ops[V], layout: Layout, v: V, magnitude: V | None) -> V:
    """diag(magnitude / ‖V‖) · V in the stored shape, in any IR.

    The norm is no function of the factors for gradients (section 4.3 of the paper), as in PEFT.

    Args:
        e: An emitter of the IR.
        layout: How [*batch, out, in] lies in v.
        v: The sum W + s·b·a, as it is stored.
        magnitude: The norms that the rows shall have, [*batch, out].
    """
    rows = e.op("mul", layout.from_stored(e, v), stretch(e, layout, v, magnitude))
    return layout.to_stored(e, rows)


def stretch(e: Ops[V], layout: Layout, v: V, magnitude: V | None) -> V:
    """Magnitude / ‖V‖ as [*batch, out, 1]; see `rescaled`."""
    norm = e.op("detach", e.op("norm", layout.from_stored(e, v)))
    column = e.op("reshape", magnitude, shape=(*layout.batch_shape, layout.out_size, 1))
    return e.op("div", column, norm)


# The values that an update starts from. The base weight is never changed.
#
# ===========  ==========================================  =======  ==============================
# name         a, b                                        reads    source
# ===========  ==========================================  =======  ==============================
# kaiming      a uniform in ±1/√in; b = 0                  nothing  PEFT's default
# gaussian     a normal with variance 1/r²; b = 0          nothing  PEFT
# orthogonal   b·a = 0, neither of them zero; even r       nothing  PEFT
# pissa        s·b·a = the best rank-r part of W           W        Meng et al. 2024, 2404.02948
# olora        b·a = Q_r R_r of W = QR                     W        Büyükakyüz 2024, 2406.01775
# eva          a = the first r principal axes of x; b = 0  data     Paischer et al., 2410.07170
# lora-ga      singular vectors of ∂L/∂W: a the first r,   data     Wang et al. 2024, 2407.05000
#              b the next r
# ===========  ==========================================  =======  ==============================
#
# Where s·b·a is not zero at the start (pissa, olora, lora-ga), the papers take it off W. Here W
# stays, and −s·b₀a₀ is a frozen half of the update: ΔW = s·(b·a − b₀a₀), of rank 2r and zero at the
# start. Such an adapter is plain LoRA for every reader, and `truncate` brings its rank back.


Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga"]
INITS = get_args(Init)
OF_WEIGHT = frozenset({"pissa", "olora"})
OF_DATA: Mapping[str, str] = {"eva": "inputs", "lora-ga": "gradient"}
"""The statistic that a start reads, by the start's name."""
GAMMA = 16.0
"""LoRA-GA's γ, which says how large an update starts; its authors' and PEFT's default."""


def check_init(init: str) -> None:
    """Raise for a start that is not known."""
    expect_name(init, INITS, "no init", f"the starts are {', '.join(INITS)}")


def initial(
    found: Found,
    plan: Plan,
    variant: str = "lora",
    seed: int = 0,
    init: str = "kaiming",
    read: Callable[[str], Array] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> tuple[dict[str, LowRank], tuple[str, ...]]:
    """The updates of a plan at their start, and notes on ranks that a start cannot have.

    Args:
        found: The model's targets.
        plan: Target key → rank and alpha.
        variant: A name of `lora_fx.adapter.variant`.
        seed: Each target draws from (seed, key).
        init: A name of the table above.
        read: The stored tensor of a parameter, for pissa, olora, and DoRA's magnitudes.
        moments: By key, for eva and lora-ga.

    Raises:
        LoraFxError: A name that is not known, a rank that the start cannot have, a part of W that
            is not unique, a row of W without a direction.
    """
    check_init(init)
    kind = named_variant(variant)
    if isinstance(kind, QaLora) and init != "kaiming":
        raise LoraFxError(
            f"init {init!r} gives every input a column of A; qalora has one for a group of them",
            "leave --init out",
        )
    updates, notes = {}, []
    for key, entry in plan.entries.items():
        target = found[key]
        fitted = _fitted(key, entry, target.layout, init)
        if fitted.rank != entry.rank:
            notes.append(f"{key}: rank {entry.rank} lowered to {fitted.rank} for {init}")
        weight = None
        if read is not None and (init in OF_WEIGHT or not kind.branches):
            check_storable(target, f"{variant if init not in OF_WEIGHT else init} reads W itself")
            weight = matrix(target, read(target.parameter.name))
        scale = scale_of(fitted.alpha, fitted.rank, kind.name)
        source = weight
        if init in OF_DATA:
            source = getattr((moments or {}).get(key), OF_DATA[init], None)
        a, b = _start(target, fitted.rank, scale, seed, init, source)
        low = LowRank(a, b, fitted.alpha, target.layout, variant, own_use(key))
        twins = tuple(target.parameter.aliases) if target.of_several else ()
        low = replace(low, op=target.op, tied=target.of_several, twins=twins)
        if b.any() and init != "orthogonal":
            low = _with_frozen(low, scale, a, b)  # so that it is zero
        updates[key] = kind.prepared(low, weight, repr(key))
    return updates, tuple(notes)


def matrix(target: Target, stored: Array) -> Array:
    """The part of a stored tensor that a target is, as [*batch, out, in] in fp64 or complex128."""
    part = widened(stored[tuple(slice(lo, hi) for lo, hi in target.region)])
    return np.asarray(target.layout.from_stored(NumpyEmitter(), part))


def _fitted(key: str, entry: Entry, layout: Layout, init: str) -> Entry:
    """The entry with the highest rank that the start allows; alpha/rank stays."""
    rank = entry.rank
    if init == "orthogonal":
        rank -= rank % 2 if entry.rank == layout.max_rank else 0
        if rank % 2 or not rank:
            raise LoraFxError(
                f"{key!r}: an orthogonal start has an even rank, not {entry.rank}",
                "--rank 8, or exclude it",
            )
    if init == "lora-ga":  # a and b are different singular vectors
        rank = min(rank, layout.max_rank // 2)
        if not rank:
            raise LoraFxError(
                f"{key!r}: LoRA-GA takes two singular vectors a rank; its smaller side is 1",
                "exclude it",
            )
    return replace(entry, rank=rank, alpha=entry.alpha * rank / entry.rank)


def _with_frozen(low: LowRank, scale: float, a: Array, b: Array) -> LowRank:
    """The update at its scale with −b·a, fp32 factors of its rank, in its last ranks."""
    a, b = np.concatenate([low.a, a], -2), np.concatenate([low.b, -b], -1)
    alpha = alpha_of(scale, 2 * low.rank, low.variant)
    return replace(low, a=a, b=b, alpha=alpha, frozen=low.rank)


def _start(
    target: Target, rank: int, scale: float, seed: int, init: str, source: Array | None
) -> Factors:
    """A [*batch, rank, in] and b [*batch, out, rank]; `source` is what the start reads.

    They are fp32, and complex64 for a complex parameter.

    Raises:
        LoraFxError: A start that only real numbers have, or one without its data.
    """
    key, layout = target.key, target.layout
    dtype = target.parameter.dtype
    if init == "kaiming":
        return draw(key, layout, rank, seed, dtype=dtype)
    a_shape, b_shape = layout.factor_shapes(rank)
    kind = factor_dtype(dtype)
    zero = np.zeros(b_shape, kind)
    if init == "gaussian":
        a = of_parts(generator(key, seed).standard_normal, a_shape, kind) / rank
        return a.astype(kind), zero
    if init == "orthogonal":
        return _orthogonal(key, layout, rank, seed, kind)
    if init in OF_WEIGHT:
        assert source is not None
        return _each(source, lambda w: _of_weight(w, rank, scale, init))
    if kind.kind == "c":
        raise LoraFxError(
            f"{key!r} is {dtype}, and init {init!r} reads data of real numbers",
            "kaiming, gaussian, orthogonal, pissa or olora",
        )
    if source is None:
        raise LoraFxError(
            f"{key!r}: {init} starts from data, and calibration could not read this target",
            "exclude it, or take another --init",
        )
    wide = np.asarray(source, np.float64)
    if init == "eva":
        if wide.ndim == 1:  # of one-hot x: the rows that are looked up most
            axes = np.zeros((len(wide), rank))
            axes[np.argsort(-wide, kind="stable")[:rank], np.arange(rank)] = 1.0
        else:
            axes = np.linalg.eigh(wide)[1][..., ::-1][..., :rank]  # eigh ascends
        return np.ascontiguousarray(np.swapaxes(axes, -1, -2), np.float32), zero
    if not np.isfinite(wide).all() or not wide.any():
        raise LoraFxError(
            f"{key!r}: its gradient is zero or not finite, so LoRA-GA has no start",
            "exclude it, or look at the data",
        )
    return _each(wide, lambda g: _of_gradient(g, rank))


def _each(matrices: Array, function: Callable[[Array], Factors]) -> Factors:
    """Factors a and b of every matrix of a stack, in fp32 or complex64."""
    made = [function(m) for m in matrices.reshape(-1, *matrices.shape[-2:])]
    kind = factor_dtype(matrices.dtype.name)
    sides = (np.stack(side).astype(kind) for side in zip(*made, strict=True))
    a, b = (side.reshape(*matrices.shape[:-2], *side.shape[1:]) for side in sides)
    return a, b


def _orthogonal(key: str, layout: Layout, rank: int, seed: int, kind: NumpyDtype) -> Factors:
    """Rows of one orthogonal matrix, the odd ones for a and the even ones for b."""
    rng = generator(key, seed)
    q = np.linalg.qr(rng.standard_normal((*layout.batch_shape, rank, rank)))[0]
    odd, even = q[..., 0::2, :], q[..., 1::2, :]
    half = (*layout.batch_shape, rank // 2)
    right = of_parts(rng.standard_normal, (*half, layout.in_size), kind) / 10
    left = of_parts(rng.standard_normal, (*half, layout.out_size), kind) / 10
    a, b = np.swapaxes(odd, -1, -2) @ right, np.swapaxes(left, -1, -2) @ even
    return a.astype(kind), b.astype(kind)


def _of_weight(weight: Array, rank: int, scale: float, init: str) -> Factors:
    left, right = _part(weight, rank, init)
    if init == "olora":
        return right, left
    wide = left.shape[0] <= right.shape[1]  # then left is orthonormal, and right has the σ
    sigma = np.linalg.norm(right, axis=1) if wide else np.linalg.norm(left, axis=0)
    root = np.sqrt(np.maximum(sigma, np.finfo(np.float64).tiny)) ** (1 if wide else -1)
    left, right = left * root, right / root[:, None]  # √σ for each side
    return right / math.sqrt(scale), left / math.sqrt(scale)


def _of_gradient(gradient: Array, rank: int) -> Factors:
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    size = gradient.shape[0] ** 0.25 / math.sqrt(GAMMA)
    return vt[:rank] * size, u[:, rank : 2 * rank] * size


# The part that an initialisation took off the base weight, redone from the base alone.
#
# PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start from factors of W and train on the
# residual W₀ = W − s·b₀a₀, which PEFT computes again whenever it loads such an adapter. So the
# merged weight is W₀ + s·ba and not W + s·ba. KaSA (arXiv:2412.06071) trains on W without its
# least singular parts.
#
# ======  ===============================  ==============================================
# name    s·b₀a₀                           unique
# ======  ===============================  ==============================================
# pissa   the best rank-r part of W        where σ_r > σ_{r+1} (Eckart and Young 1936)
# olora   s · Q_r R_r of W = QR            where the first r columns of W are independent
# kasa    the last r singular parts of W   where σ_{k−r} > σ_{k−r+1}, k the smaller side
# ======  ===============================  ==============================================
#
# Q_r R_r is the projection of W onto its first r columns, so signs of the QR do not matter. PEFT
# computes in fp32, on whatever device; here in fp64, which differs from it by rounding alone. The
# residual is rounded to W's dtype, in which PEFT keeps it.


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
    scale = low.scale or 1.0  # of an update of scale 0 the part is left
    whole = replace(low, b=low.b * np.float32(low.scale / scale), mutated="")
    a, b = right.astype(np.float32), (left / scale).astype(np.float32)
    return _with_frozen(whole, scale, a, b)


def removed(weight: Array, low: LowRank, where: str) -> tuple[Array, Array]:
    """The factors of the part s·b₀a₀, in fp64; see `residual`."""
    how, rank, least = low.mutated, low.rank, min(weight.shape)
    if weight.ndim != 2 or not 0 < rank <= least - (how == "kasa"):
        raise MisfitError(f"{where}: {list(weight.shape)} has no {how} start of rank {rank}")
    wide = weight.astype(np.float64)
    if not np.isfinite(wide).all():
        raise LoraFxError(
            f"{where}: the base has NaN or infinite values", "start from a sound base"
        )
    left, right = _part(wide, rank, how, where)
    return left * (low.scale if how == "olora" else 1.0), right


def _part(weight: Array, rank: int, how: str, where: str = "") -> tuple[Array, Array]:
    """The part's two factors, [out, rank] and [rank, in] in fp64; OLoRA's still lacks the s.

    One side is orthonormal: the left one of OLoRA, that of the smaller side of the others. `where`
    is given where the part is to be redone: then one that is not unique is an error.
    """
    if how != "olora":
        return _singular(weight, rank, how, where)
    q, r = np.linalg.qr(weight[:, :rank])
    size = np.abs(np.diag(r))
    if where and size.min() <= _INDEPENDENT * size.max():
        raise LoraFxError(
            f"{where}: the first {rank} columns are not independent, so the part that OLoRA took "
            "off is not unique",
            "save the adapter again with path_initial_model_for_weight_conversion",
        )
    return q, q.T @ weight


def _singular(weight: Array, rank: int, how: str, where: str) -> tuple[Array, Array]:
    """The first or the last singular parts, by the eigenvectors of the smaller Gram matrix."""
    flat = weight if weight.shape[0] <= weight.shape[1] else weight.T
    values, vectors = np.linalg.eigh(flat @ flat.T)  # ascending
    sigma = np.sqrt(np.maximum(values[::-1], 0))
    last = rank if how == "pissa" else len(sigma) - rank
    if where and last < len(sigma) and sigma[last - 1] - sigma[last] <= _GAP * sigma[0]:
        raise LoraFxError(
            f"{where}: singular values {last} and {last + 1} are equal to fp32 "
            f"({sigma[last - 1]:g}, {sigma[last]:g}), so the part that {how} took is not unique",
            "save the adapter again with path_initial_model_for_weight_conversion",
        )
    vectors = vectors[:, ::-1]
    taken = vectors[:, :rank] if how == "pissa" else vectors[:, last:]
    rest = taken.T @ flat
    return (taken, rest) if flat is weight else (rest.T, taken.T)
