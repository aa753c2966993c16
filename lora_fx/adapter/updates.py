"""The changes that an adapter can make to one stored tensor, beside LowRank and Full.

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

from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar, cast

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import FileLayer, Origin
from lora_fx.adapter.variant import VARIANTS, named_variant, variant_of
from lora_fx.dtypes import Array
from lora_fx.ir.layout import Layout
from lora_fx.text import Json, JsonView, short


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
        (o1, i1), (o2, i2) = self.w1.shape, self.w2.shape
        return (o1 * o2, i1 * i2)

    def block(self, batch: int, rows: slice, columns: slice) -> Array:
        """A rectangle of ΔW, as `LowRank.block` gives it; there is one matrix."""
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
        turn: [blocks, size, size], fp32; a single block that is `shared` stands all along in.
        shared: See there.
        layout: That of a weight stored [out, *in]; None while unbound.
    """

    turn: Array
    shared: bool = False
    layout: Layout | None = None
    scale: ClassVar[float] = 1.0

    __repr__ = short

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]; 0 is for a size that only the base says."""
        out = self.layout.out_size if self.layout else 0
        size = len(self.turn) * self.turn.shape[-1]
        return (out, size if not self.shared else self.layout.in_size if self.layout else 0)

    def fits(self, in_: int) -> bool:
        """True where W can have this many columns."""
        return in_ % self.turn.shape[-1] == 0 if self.shared else in_ == self.shape[1]

    def of(self, weight: Array) -> Array:
        """ΔW of some rows of W [n, in], in W's dtype."""
        blocks = weight.reshape(len(weight), -1, self.turn.shape[-1]).swapaxes(0, 1)
        delta = np.matmul(blocks, self.turn.swapaxes(1, 2).astype(weight.dtype, copy=False))
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
"""Whatever an adapter can hold under a key."""


def is_tied(entry: Entry) -> bool:
    """True for an update of all uses of a tensor that several modules share."""
    if isinstance(entry, LowRank):
        return entry.origin.tied
    return isinstance(entry, Full) and entry.tied


def twins_of(entry: Entry) -> tuple[str, ...]:
    """Other names of the tensor of an update, where they are known."""
    if isinstance(entry, LowRank):
        return entry.origin.twins
    return entry.twins if isinstance(entry, Full) else ()


def is_plain(entry: Entry) -> bool:
    """True for a whole tensor or s·b·a on the base as it is: what a graph can hold."""
    if isinstance(entry, LowRank) and variant_of(entry).reads_weight:
        return False
    return is_on_base(entry)


def is_on_base(entry: Entry) -> bool:
    """True for a whole tensor, or a low-rank update of one tensor of the base as it is."""
    if isinstance(entry, LowRank):
        return not entry.mutated and not entry.origin.candidates
    return isinstance(entry, Full)


def name_of(entry: Entry) -> str:
    """What the field calls an entry (LoHa, DoRA …), for messages."""
    if isinstance(entry, LowRank):
        if entry.mutated:
            return f"meant for a base that {entry.mutated} changed"
        if entry.origin.candidates:
            return f"of one of the parameters {', '.join(entry.origin.candidates)}"
        if entry.variant.partition(":")[0] not in VARIANTS:  # of a pickle of another process
            return entry.variant
        variant = variant_of(entry)
        return variant.title if variant.reads_weight and variant.title else entry.variant
    names = {Hadamard: "LoHa", Kronecker: "LoKr", Rotation: "OFT", Dense: "a whole ΔW"}
    return {**names, ReplacedRows: "trained rows"}.get(type(entry), "a whole tensor")


# The JSON of an update: everything but its tensors, which each kind of file names in its own way.
#
# `{"layout", "use", "variant", "alpha", "rank", "scale", "frozen", "extra"}`, of which a kind of
# file holds those that its tensors and its config do not say. `extra` has what is known of few
# updates:
#
# =========================  ================================================================
# mutated                    the field of this name
# op, kernel                 of `origin`
# tied                       true, or the list of `origin.twins`
# lead, of                   of `origin.layer`
# module, depth, candidates  of `origin.layer`, where the key does not name a parameter
# group and the like         what the variant says: see `lora_fx.adapter.base.Variant.facts`
# =========================  ================================================================


Described = TypeVar("Described", bound=Change)
_READ = {"use": str, "variant": str, "alpha": float, "frozen": int}


def to_json(entry: Change, *fields: str) -> Json:
    """These fields of an update, in this order; rank and scale are there for people."""
    return {field: _plain(entry, field) for field in fields}


def from_json(entry: Described, row: JsonView) -> Described:
    """The update with what a row says of it; the rank is that of its tensors.

    Args:
        entry: The update with its tensors. What the row leaves out stays as it is here.
        row: What `to_json` gave; its layout is needed.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: The row was edited.
        LoraFxError: The row is of a variant that is not known here.
    """
    said: Json = {"layout": Layout.from_json(row["layout"]) if row["layout"] else None}
    if isinstance(entry, LowRank):
        said |= {field: read(row[field]) for field, read in _READ.items() if field in row}
    elif "scale" in row and not isinstance(entry, Hadamard):
        said["scale"] = float(row["scale"])
    facts: Json = dict(row.get("extra", {}))
    if "extra" in row and not isinstance(entry, (Dense, Rotation)):
        said |= _facts(entry, facts)
    read = replace(entry, **said)
    return cast(Described, _with_facts(read, facts)) if isinstance(read, LowRank) else read


def _with_facts(low: LowRank, facts: JsonView) -> LowRank:
    """The update with what its variant wrote into `extra`; raises for an unknown variant.

    A format that has a and b alone holds LoRA, whatever variant made them of other tensors.
    """
    named = named_variant(low.variant)
    if not named.peft_type and named.made_of and not named.also and not low.variant_tensors:
        low = replace(low, variant="lora")
    for variant in VARIANTS.values():
        low = variant.with_facts(low, facts)
    return low


def _plain(entry: Change, field: str) -> object:
    if field == "layout":
        return entry.layout.to_json() if entry.layout else None
    if field == "extra":
        return _extra(entry)
    value = getattr(entry, field)
    return float(value) if field in ("alpha", "scale") else value


def _extra(entry: Change) -> Json:
    if isinstance(entry, (Dense, Rotation)):
        return {}
    if not isinstance(entry, LowRank):
        kernel = list(entry.kernel)
        return {"op": f"conv{len(kernel)}d", "kernel": kernel} if kernel else {}
    origin = entry.origin
    facts: Json = {"op": origin.op, "kernel": list(origin.kernel)}
    facts |= {"tied": list(origin.twins) or origin.tied, "mutated": entry.mutated}
    layer = origin.layer or FileLayer("")
    facts |= {"lead": layer.lead, "of": layer.of, **variant_of(entry).facts(entry)}
    found = {name: value for name, value in facts.items() if value}
    if layer.candidates:
        maybe = {name: list(numbers) for name, numbers in layer.candidates.items()}
        found |= {"module": layer.module, "depth": layer.depth, "candidates": maybe}
    return found


def _facts(entry: LowRank | Hadamard | Kronecker, extra: JsonView) -> Json:
    kernel = tuple(int(n) for n in extra.get("kernel", ()))
    if not isinstance(entry, LowRank):
        return {"kernel": kernel}
    tied = extra.get("tied")
    layer = None
    if "lead" in extra:
        lead, module = str(extra["lead"]), str(extra.get("module", ""))
        of, depth = int(extra.get("of", 0)), int(extra.get("depth", 0))
        pairs = extra.get("candidates", {}).items()
        candidates = {str(k): (int(r), float(s)) for k, (r, s) in pairs}
        layer = FileLayer(lead, of, module, depth, candidates)
    twins = tuple(str(name) for name in tied) if isinstance(tied, list) else ()
    origin = Origin(str(extra.get("op", "")), kernel, bool(tied), twins, layer)
    return {"origin": origin, "mutated": str(extra.get("mutated", ""))}
