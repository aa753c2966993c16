"""The initial values of updates, by init name. The base weight never changes.

===========  ==========================================  =======  ==============================
name         a, b                                        reads    source
===========  ==========================================  =======  ==============================
kaiming      a uniform in ±1/√in; b = 0                  nothing  PEFT's default
gaussian     a normal with variance 1/r²; b = 0          nothing  PEFT
orthogonal   b·a = 0, neither of them zero; even r       nothing  PEFT
pissa        s·b·a = the best rank-r part of W           W        Meng et al. 2024, 2404.02948
olora        b·a = Q_r R_r of W = QR                     W        Büyükakyüz 2024, 2406.01775
eva          a = the first r principal axes of x; b = 0  data     Paischer et al., 2410.07170
lora-ga      singular vectors of ∂L/∂W: a the first r,   data     Wang et al. 2024, 2407.05000
             b the next r
===========  ==========================================  =======  ==============================

Where s·b·a is not zero at the start (pissa, olora, lora-ga), the papers take it off W. Here W
stays, and −s·b₀a₀ is a frozen half of the update: ΔW = s·(b·a − b₀a₀), of rank 2r and zero at the
start. Such an adapter is plain LoRA for every reader, and `truncate` brings its rank back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from lora_fx.adapter.lowrank import (
    Factors,
    LowRank,
    draw,
    of_parts,
    scale_of,
)
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.residual import start_of_weight, with_frozen_start
from lora_fx.adapter.variant import named_variant
from lora_fx.adapter.variant_protocol import (
    Beginning,
)
from lora_fx.dtypes import Array, NumpyDtype, factor_dtype, widened
from lora_fx.errors import LoraFxError, expect_name
from lora_fx.inputs import generator
from lora_fx.ir.layout import Layout
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.targets.found import Found
from lora_fx.targets.keys import own_use
from lora_fx.targets.moments import Moments
from lora_fx.targets.plan import Entry, Plan
from lora_fx.targets.target import Target, check_storable

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "lora-ga"]


INITS = get_args(Init)


OF_WEIGHT = frozenset({"pissa", "olora"})


OF_DATA: Mapping[str, str] = {"eva": "inputs", "lora-ga": "gradient"}
"""The name of a data-dependent init → the statistic that it reads."""


GAMMA = 16.0
"""LoRA-GA's γ, which sets the size of an initial update; the default of the paper and of PEFT."""


def check_init(init: str) -> None:
    """Raise LoraFxError for an unknown init."""
    expect_name(init, INITS, "unknown init", f"use one of {', '.join(INITS)}")


def initial(
    found: Found,
    plan: Plan,
    variant: str = "lora",
    seed: int = 0,
    init: str = "kaiming",
    read: Callable[[str], Array] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> tuple[dict[str, LowRank], tuple[str, ...]]:
    """Initialise the updates of a plan; also return notes on ranks that an init had to lower.

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
    kind.check_init(init)
    updates: dict[str, LowRank] = {}
    notes: list[str] = []
    layouts = [found[key].layout for key in plan.entries]
    widest = (
        max((layout.in_size for layout in layouts), default=1),
        max((layout.out_size for layout in layouts), default=1),
    )
    for key, entry in plan.entries.items():
        target = found[key]
        fitted = _fitted(key, entry, target.layout, init)
        if fitted.rank != entry.rank:
            notes.append(f"{key}: rank {entry.rank} is lowered to {fitted.rank} for init {init}")

        weight = None
        if read is not None and (init in OF_WEIGHT or kind.reads_weight):
            reader = init if init in OF_WEIGHT else variant
            check_storable(target, f"{reader} reads W itself")
            weight = matrix(target, read(target.parameter.name))
        source = weight
        if init in OF_DATA:
            source = getattr((moments or {}).get(key), OF_DATA[init], None)

        scale = scale_of(fitted.alpha, fitted.rank, kind.name)
        a, b = _start(target, fitted.rank, scale, seed, init, source)
        twins = tuple(target.parameter.aliases) if target.of_several else ()
        origin = Origin(op=target.op, tied=target.of_several, twins=twins)
        low = LowRank(a, b, fitted.alpha, target.layout, variant, own_use(key), origin=origin)
        if b.any() and init != "orthogonal":
            low = with_frozen_start(low, scale, a, b)  # so that ΔW is zero
        updates[key] = kind.prepared(low, Beginning(key, seed, weight, widest))
    return updates, tuple(notes)


def matrix(target: Target, stored: Array) -> Array:
    """Return a target's part of a stored tensor, as [*batch, out, in] in fp64 or complex128."""
    region = tuple(slice(first, end) for first, end in target.region)
    part = widened(stored[region])
    return np.asarray(target.layout.from_stored(NumpyEmitter(), part))


def _fitted(key: str, entry: Entry, layout: Layout, init: str) -> Entry:
    """Return the entry with its rank lowered to what the init allows; alpha/rank stays."""
    rank = entry.rank
    if init == "orthogonal":
        if rank == layout.max_rank:
            rank -= rank % 2
        if rank % 2 or not rank:
            raise LoraFxError(
                f"{key!r}: init orthogonal needs an even rank, not {entry.rank}",
                "pass an even rank such as --rank 8, or exclude it",
            )
    if init == "lora-ga":  # a and b are different singular vectors
        rank = min(rank, layout.max_rank // 2)
        if not rank:
            raise LoraFxError(
                f"{key!r}: init lora-ga needs two singular vectors for each rank, but the smaller "
                "side is 1",
                "exclude it",
            )
    return replace(entry, rank=rank, alpha=entry.alpha * rank / entry.rank)


def _start(
    target: Target, rank: int, scale: float, seed: int, init: str, source: Array | None
) -> Factors:
    """Return a [*batch, rank, in] and b [*batch, out, rank], fp32, or complex64 if W is complex.

    Args:
        target: The target of the update.
        rank: The rank of both.
        scale: The scale of the update.
        seed: The target draws from (seed, key).
        init: The name of the start.
        source: W, the second moment of x, or the gradient: whatever the start reads.

    Raises:
        LoraFxError: A start that only real numbers have, or one without its data.
    """
    key = target.key
    layout = target.layout
    dtype = target.parameter.dtype
    kind = factor_dtype(dtype)
    if init == "kaiming":
        return draw(key, layout, rank, seed, dtype=dtype)
    if init == "gaussian":
        a_shape, b_shape = layout.factor_shapes(rank)
        a = of_parts(generator(key, seed).standard_normal, a_shape, kind) / rank
        return a.astype(kind), np.zeros(b_shape, kind)
    if init == "orthogonal":
        return _orthogonal(key, layout, rank, seed, kind)
    if init in OF_WEIGHT:
        assert source is not None
        return _of_each_matrix(source, lambda weight: _of_weight(weight, rank, scale, init))

    if kind.kind == "c":
        raise LoraFxError(
            f"{key!r} is {dtype}, but init {init!r} works only with real numbers",
            "choose kaiming, gaussian, orthogonal, pissa or olora",
        )
    if source is None:
        raise LoraFxError(
            f"{key!r}: init {init} needs data, but calibration could not read this target",
            "exclude it, or choose another --init",
        )
    moment = np.asarray(source, np.float64)
    if init == "eva":
        _, b_shape = layout.factor_shapes(rank)
        return _principal_axes(moment, rank), np.zeros(b_shape, kind)
    if not np.isfinite(moment).all() or not moment.any():
        raise LoraFxError(
            f"{key!r}: its gradient is zero or not finite, so init lora-ga cannot start",
            "exclude it, or check the data",
        )
    return _of_each_matrix(moment, lambda gradient: _of_gradient(gradient, rank))


def _of_each_matrix(matrices: Array, function: Callable[[Array], Factors]) -> Factors:
    """Apply a function to every matrix of a stack; return factors a and b in fp32 or complex64."""
    kind = factor_dtype(matrices.dtype.name)
    all_a = []
    all_b = []
    for single in matrices.reshape(-1, *matrices.shape[-2:]):
        a, b = function(single)
        all_a.append(a)
        all_b.append(b)
    batch_shape = matrices.shape[:-2]
    a = np.stack(all_a).astype(kind)
    b = np.stack(all_b).astype(kind)
    return a.reshape(*batch_shape, *a.shape[1:]), b.reshape(*batch_shape, *b.shape[1:])


def _orthogonal(key: str, layout: Layout, rank: int, seed: int, kind: NumpyDtype) -> Factors:
    """Return factors from one orthogonal matrix: its odd rows for a, and its even rows for b."""
    rng = generator(key, seed)
    q, _ = np.linalg.qr(rng.standard_normal((*layout.batch_shape, rank, rank)))
    odd = q[..., 0::2, :]
    even = q[..., 1::2, :]
    half = (*layout.batch_shape, rank // 2)
    right = of_parts(rng.standard_normal, (*half, layout.in_size), kind) / 10
    left = of_parts(rng.standard_normal, (*half, layout.out_size), kind) / 10
    a = np.swapaxes(odd, -1, -2) @ right
    b = np.swapaxes(left, -1, -2) @ even
    return a.astype(kind), b.astype(kind)


def _of_weight(weight: Array, rank: int, scale: float, init: str) -> Factors:
    """Return PiSSA's or OLoRA's a and b for W [out, in]: s·b·a, or b·a, is a part of W."""
    left, right = start_of_weight(weight, rank, init)
    if init == "olora":
        return right, left

    # One side is orthonormal, and the other one has the σ: each gets √σ.
    left_is_orthonormal = left.shape[0] <= right.shape[1]
    tiny = np.finfo(np.float64).tiny
    if left_is_orthonormal:
        sigma = np.linalg.norm(right, axis=1)
        root = np.sqrt(np.maximum(sigma, tiny))
    else:
        sigma = np.linalg.norm(left, axis=0)
        root = np.sqrt(np.maximum(sigma, tiny)) ** -1
    a = right / root[:, None] / math.sqrt(scale)
    b = left * root / math.sqrt(scale)
    return a, b


def _principal_axes(moment: Array, rank: int) -> Array:
    """Return EVA's a [*batch, rank, in]: the axes along which x is largest.

    Args:
        moment: E[x xᵀ], or its diagonal [in] where x is one-hot: then the axes are the rows that
            are looked up most.
        rank: How many axes.
    """
    if moment.ndim == 1:
        axes = np.zeros((len(moment), rank))
        most_frequent = np.argsort(-moment, kind="stable")[:rank]
        axes[most_frequent, np.arange(rank)] = 1.0
    else:
        _, vectors = np.linalg.eigh(moment)  # ascending
        axes = vectors[..., ::-1][..., :rank]
    return np.ascontiguousarray(np.swapaxes(axes, -1, -2), np.float32)


def _of_gradient(gradient: Array, rank: int) -> Factors:
    """Return LoRA-GA's a and b: the first singular vectors of ∂L/∂W, and the next ones."""
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    size = gradient.shape[0] ** 0.25 / math.sqrt(GAMMA)
    return vt[:rank] * size, u[:, rank : 2 * rank] * size
