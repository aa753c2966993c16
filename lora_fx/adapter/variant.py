"""The registry of variants, and what an update is by it: its tensors, its numbers, its program.

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

The protocol is `lora_fx.adapter.base`. A variant composes Kinds and knows no IR.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from lora_fx.adapter.base import (
    Beginning,
    FactorTensor,
    Half,
    Variant,
    tensor_name,
)
from lora_fx.adapter.dora import Dora
from lora_fx.adapter.lora import Lora
from lora_fx.adapter.lowrank import (
    Factors,
    LowRank,
    Updates,
    alpha_of,
    draw,
    of_parts,
    scale_of,
)
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.qalora import QaLora
from lora_fx.dtypes import Array, NumpyDtype, factor_dtype, widened
from lora_fx.errors import LoraFxError, MisfitError, MistakeError, expect, expect_name
from lora_fx.inputs import generator
from lora_fx.ir.layout import Layout
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.targets.budget import Moments
from lora_fx.targets.plan import Entry, Plan
from lora_fx.targets.target import Found, Target, check_storable, own_use
from lora_fx.text import Json, JsonView, near

VariantName = Literal["lora", "rslora", "dora", "lora-fa", "lora+", "qalora"] | str
"""Those of VARIANTS; a text, since qalora may carry the size of its groups: qalora:32."""
VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Lora("lora"),
        Lora("rslora"),  # its scale falls with √rank, so that high ranks learn as fast as low ones
        Dora("dora"),
        # a stays as it was drawn: neither its gradient nor x has to be kept
        Lora("lora-fa", still=("a",)),
        Lora("lora+", ratio=16.0),
        QaLora("qalora"),
    )
}
_ROW = frozenset((
    "A", "A0", "B", "B0", "a0", "alpha", "b0", "dense", "extra", "full", "index", "key", "layout",
    "magnitude", "rank", "role", "rows", "scale", "swapped", "use", "variant",
))  # fmt: skip
"""Words that names of tensors and the JSON of an update have beside the fields of its tensors."""


def register(variant: Variant) -> None:
    """Add a variant, so that every verb, file and command knows its name.

    Raises:
        MistakeError: Another variant has this name, or a field has a name that files use for
            something else.
    """
    if variant.name in VARIANTS or not variant.name or ":" in variant.name:
        raise MistakeError(f"a variant cannot be called {variant.name!r}: the name is taken")
    fields = (*variant.made_of, *variant.also)
    taken = [f for f in fields if f in _ROW or fields.count(f) > 1 or not f.isidentifier()]
    if taken:
        raise MistakeError(f"{variant.name}: a tensor cannot have the field {taken[0]!r}")
    VARIANTS[variant.name] = variant


def named_variant(name: str) -> Variant:
    """The variant of a name, or of NAME:ARGUMENT; LoraFxError where there is none."""
    expect(name, str, "variant", "a name", _known())
    kind, colon, argument = name.partition(":")
    if colon and kind in VARIANTS:
        variant = VARIANTS[kind].with_argument(argument)
        if variant is not None:
            return variant
    expect_name(name, VARIANTS, "no variant", _known())
    return VARIANTS[name]


def expect_variant(name: str, where: str) -> None:
    """Refuse a file whose update is of a variant that nothing here knows.

    Args:
        name: The variant's name in the file.
        where: The file, and what of it, for the message.
    """
    if name.partition(":")[0] not in VARIANTS:
        raise LoraFxError(
            f"{where} is of variant {name!r}, which is not known here; its tensors are not read",
            near(name, VARIANTS, _known()),
        )


def _known() -> str:
    return f"the variants are {', '.join(VARIANTS)}"


def variant_of(low: LowRank) -> Variant:
    """What an update is by its tensors; its variant's name may say no more than its scale."""
    named = named_variant(low.variant)
    for variant in (named, *VARIANTS.values()):
        recognised = variant.of(low)
        if recognised is not None:
            return recognised
    # an update of which a and b were rewritten, and not the tensors that made them
    return VARIANTS["lora"] if named.made_of else named


def names_taken(*, reading_weight: bool) -> list[str]:
    """Variants by their form, for messages: with those that read W itself, or without."""
    forms = (v for v in VARIANTS.values() if not (v.learns_as_lora or v.constant_over))
    return [v.name for v in forms if reading_weight or not v.reads_weight]


def is_lora_or_dora(low: LowRank) -> bool:
    """True for what files of other trainers can say: a sum, or what PEFT's type LORA has."""
    variant = variant_of(low)
    return not variant.reads_weight or bool(variant.peft_type)


# The tensors of updates in a model.


def halves(key: str, low: LowRank, *, split: bool = True) -> tuple[Half, ...]:
    """The trained ranks of an update, then the frozen ones if it has such.

    Args:
        key: The key of the update.
        low: The update.
        split: False gives one half with all ranks of a and b as they are, for graphs that train
            nothing.
    """
    variant = variant_of(low) if split else VARIANTS["lora"]
    rank = low.rank
    if split and not variant.made_of:
        rank -= low.frozen
    values = dict(variant.tensors(low))
    if rank < low.rank:
        values = {"a": low.a[..., :rank, :], "b": low.b[..., :rank]}
    top = {
        field: FactorTensor(field, tensor_name(key, field), value, field not in variant.still)
        for field, value in values.items()
    }
    trained = Half(variant, top, rank)
    if rank == low.rank:
        return (trained,)
    a0 = FactorTensor("a0", tensor_name(key, "a0"), low.a[..., rank:, :], False)
    b0 = FactorTensor("b0", tensor_name(key, "b0"), low.b[..., rank:], False)
    return trained, Half(variant, {"a": a0, "b": b0}, low.rank - rank)


def slots_of(key: str, low: LowRank, *, split: bool = True) -> tuple[FactorTensor, ...]:
    """Every tensor of an update, in the order of the table of `lora_fx.adapter.base`.

    Args:
        key: The key of the update.
        low: The update.
        split: As in `halves`.
    """
    slots = [slot for half in halves(key, low, split=split) for slot in half.tensors.values()]
    variant = variant_of(low)
    for field, value in variant.beside(low).items():
        trained = field not in variant.still
        slots.append(FactorTensor(field, tensor_name(key, field), value, trained))
    return tuple(slots)


def with_values(low: LowRank, values: Mapping[str, Array]) -> LowRank:
    """The update with other numbers.

    Args:
        low: The update.
        values: Arrays by field, for every field that `slots_of` names.
    """
    return variant_of(low).with_values(low, values)


def resized(low: LowRank, factor: float) -> LowRank:
    """The update with `factor` times its ΔW, in the tensors that it has."""
    variant = variant_of(low)
    values = {slot.field: slot.value for slot in slots_of("", low)}
    for field in (variant.proportional, "b0"):
        if field in values:
            values[field] = values[field] * np.float32(factor)
    return variant.with_values(low, values)


def asked(low: LowRank) -> tuple[int, float]:
    """Rank and alpha without the frozen ranks, as whoever inserted the update gave them."""
    rank = low.rank - low.frozen
    alpha = alpha_of(low.scale, rank, low.variant) if low.frozen else variant_of(low).alpha(low)
    return rank, alpha


def fields_of_files() -> tuple[str, ...]:
    """The fields by which files name the tensors of an update, of every variant."""
    fields = dict.fromkeys(("a", "b", "a0", "b0"))
    for variant in VARIANTS.values():
        fields |= dict.fromkeys((*variant.made_of, *variant.also))
    return tuple(fields)


def bare(values: Mapping[str, Array], row: JsonView) -> LowRank:
    """The update that the tensors of a file are of, before the JSON of it is read.

    Args:
        values: Its tensors by field.
        row: Its JSON, for the variant's name.
    """
    variant = named_variant(str(row.get("variant", "lora")))
    empty = np.zeros((1, 1), np.float32)
    low = LowRank(empty, empty, 0.0, variant=variant.name, magnitude=values.get("magnitude"))
    if variant.peft_type:
        return replace(low, a=values["a"], b=values["b"])
    return variant.with_values(low, values)


LEARNS = "learns"
"""The adapter metadata that keeps what no format says: how the updates learn."""


def learning(updates: Updates) -> Json:
    """Metadata from which `relearning` makes the variants and the frozen ranks again."""
    variants = {k: u.variant for k, u in updates.items() if named_variant(u.variant).learns_as_lora}
    frozen = {k: u.frozen for k, u in updates.items() if u.frozen}
    return {LEARNS: {"variants": variants, "frozen": frozen}} if variants or frozen else {}


def relearning(updates: Updates, metadata: JsonView) -> tuple[dict[str, LowRank], Json]:
    """Updates that learn as the metadata says, and the rest of the metadata."""
    variants = _rows_of(metadata, "variants")
    frozen = _rows_of(metadata, "frozen")
    result = {}
    for key, u in updates.items():
        learns = VARIANTS.get(str(variants.get(key, "")))
        if u.variant == "lora" and learns is not None and learns.learns_as_lora:
            u = replace(u, variant=learns.name)
        if isinstance(frozen.get(key), int) and 0 < frozen[key] < u.rank:
            u = replace(u, frozen=frozen[key])
        result[key] = u
    return result, {k: v for k, v in metadata.items() if k != LEARNS}


def _rows_of(metadata: JsonView, what: str) -> JsonView:
    """Key → what `learning` wrote of it; empty for metadata of a file that says something else."""
    learns = metadata.get(LEARNS)
    rows = learns.get(what) if isinstance(learns, Mapping) else None
    return rows if isinstance(rows, Mapping) else {}


def frame(updates: Updates) -> dict[str, tuple[object, ...]]:
    """All of the updates that a program depends on: everything but the numbers in a and b.

    The scale is part of it, since it is a constant in the graph. The rank is where a weight is
    reshaped on the way to its matrix; a plain one has the same nodes at any rank.
    """

    def sizes(key: str, u: LowRank) -> tuple[tuple[int, ...], ...]:
        tensors = halves(key, u)[0].tensors
        if set(tensors) != {"a", "b"}:
            return tuple(slot.value.shape for slot in tensors.values())
        shape, layout = tensors["a"].value.shape, u.layout
        matrix = layout and len(layout.in_) == len(layout.out) == 1 and not layout.batch
        return (shape[1:] if matrix and not u.frozen else shape,)

    def fields(key: str, u: LowRank) -> tuple[str, ...]:
        return tuple(slot.field for slot in slots_of(key, u))

    return {
        k: (sizes(k, u), u.frozen, u.scale, u.layout, u.use, u.variant, fields(k, u))
        for k, u in updates.items()
    }


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
    kind.check_init(init)
    updates, notes = {}, []
    for key, entry in plan.entries.items():
        target = found[key]
        fitted = _fitted(key, entry, target.layout, init)
        if fitted.rank != entry.rank:
            notes.append(f"{key}: rank {entry.rank} lowered to {fitted.rank} for {init}")
        weight = None
        if read is not None and (init in OF_WEIGHT or kind.reads_weight):
            check_storable(target, f"{variant if init not in OF_WEIGHT else init} reads W itself")
            weight = matrix(target, read(target.parameter.name))
        scale = scale_of(fitted.alpha, fitted.rank, kind.name)
        source = weight
        if init in OF_DATA:
            source = getattr((moments or {}).get(key), OF_DATA[init], None)
        a, b = _start(target, fitted.rank, scale, seed, init, source)
        low = LowRank(a, b, fitted.alpha, target.layout, variant, own_use(key))
        twins = tuple(target.parameter.aliases) if target.of_several else ()
        low = replace(low, origin=Origin(op=target.op, tied=target.of_several, twins=twins))
        if b.any() and init != "orthogonal":
            low = _with_frozen(low, scale, a, b)  # so that it is zero
        updates[key] = kind.prepared(low, Beginning(key, seed, weight))
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
