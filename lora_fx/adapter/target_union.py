"""The union of the targets of several adapters, for which a module is compiled once.

An adapter without an update for one of these targets has one there that is zero: a = 0 and b = 0,
so that neither has a gradient, and training leaves both as they are. Ranks below the least rank of
a target are filled up with zeros in the same way. Scales are tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np

from lora_fx.adapter.factor_tensors import is_plain_matrix
from lora_fx.adapter.lowrank import LowRank, Updates
from lora_fx.adapter.runtime_scale import RUNTIME_SCALE, SCALE
from lora_fx.adapter.variant import VARIANTS, variant_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import Layout

LEAST_RANK = 2
"""torch.compile makes sizes 0 and 1 constants of a program, whatever is said of the size."""


TAKEN = tuple(VARIANTS[name] for name in ("lora", "rslora", "lora+"))
"""Variants with the same tensors, of which the same ones train."""


@dataclass(frozen=True)
class TargetUnion:
    """The targets of a set of adapters.

    Attributes:
        slots: Key → the zero update of least rank, which an adapter without this key has there.
    """

    slots: Mapping[str, LowRank] = field(default_factory=dict)

    def extended(self, updates: Updates) -> TargetUnion:
        """Return the union with the targets of one more adapter, if a slot can hold its updates."""
        slots = dict(self.slots)
        for key, low in updates.items():
            rank = _least_rank(low)
            is_known = key in slots and slots[key].rank >= rank
            if not is_known and not _refusal(low) and low.layout is not None:
                slots[key] = empty_slot(low.layout, low.use, rank, low.a.dtype.name)
        return TargetUnion(slots)

    def misfits(self, updates: Updates) -> list[str]:
        """Return the updates that no slot can hold, each with the reason."""
        misfits = []
        for key, low in updates.items():
            reason = _refusal(low)
            slot = self.slots.get(key)
            if reason:
                misfits.append(f"{key!r} is {reason}")
            elif slot is None:
                misfits.append(f"{key!r} is a new target")
            elif slot.rank < _least_rank(low):
                misfits.append(f"{key!r} has rank {low.rank}, and the program {slot.rank}")
        return misfits

    def installed(self, updates: Updates) -> dict[str, LowRank]:
        """Return an update for every target: those of an adapter, and zero elsewhere.

        An adapter that does not fit is returned as it is.
        """
        if self.misfits(updates):
            return dict(updates)
        completed = {}
        for key, slot in self.slots.items():
            low = updates.get(key)
            completed[key] = slot
            if low is not None:
                missing = max(0, slot.rank - low.rank)
                a = _filled_up(low.a, missing, axis=-2)
                b = _filled_up(low.b, missing, axis=-1)
                completed[key] = _with_runtime_scale(low, a, b, low.scale)
        return completed


@dataclass(frozen=True)
class Installation:
    """What a module has in its branches for an adapter.

    Attributes:
        union: The union of targets with those of the adapter; None in a module without one.
        updates: What the branches hold.
        misfits: The updates for which no slot was there, each with the reason.
        changed_ranks: The keys whose rank is another than that of the adapter before.
    """

    union: TargetUnion | None
    updates: Updates
    misfits: Sequence[str] = ()
    changed_ranks: Set[str] = frozenset()

    @classmethod
    def of(cls, union: TargetUnion | None, before: Updates, after: Updates) -> Installation:
        """Return what an adapter with the updates `after` puts into the place of `before`."""
        if union is None:
            return cls(None, after)
        extended = union.extended(after)
        changed = changed_ranks(before, after)
        return cls(extended, extended.installed(after), union.misfits(after), changed)


def empty_slot(layout: Layout, use: str, rank: int = LEAST_RANK, dtype: str = "float32") -> LowRank:
    """Return the zero update of a target.

    Args:
        layout: The layout of the target.
        use: The use of a shared tensor that it is for; empty for all uses.
        rank: Its rank.
        dtype: The dtype of its factors.
    """
    a_shape, b_shape = layout.factor_shapes(rank)
    a = np.zeros(a_shape, dtype)
    b = np.zeros(b_shape, dtype)
    return _with_runtime_scale(LowRank(a, b, 0.0, layout, use=use), a, b, 0.0)


def changed_ranks(before: Updates, after: Updates) -> frozenset[str]:
    """Return the keys whose rank differs between two adapters; one without a key has rank 0."""
    keys = {*before, *after}
    return frozenset(key for key in keys if _rank_in(before, key) != _rank_in(after, key))


def _rank_in(updates: Updates, key: str) -> int:
    return updates[key].rank if key in updates else 0


def _refusal(low: LowRank) -> str:
    """Return what an update is that no slot can hold; empty for one that a slot can hold."""
    if low.frozen:
        return "an update with frozen ranks"
    variant = variant_of(low)
    return "" if variant in TAKEN else f"of variant {variant.title or variant.name}"


def _least_rank(low: LowRank) -> int:
    """Return the rank that a slot needs for an update; a plain matrix takes every rank."""
    return LEAST_RANK if is_plain_matrix(low.layout) else max(low.rank, LEAST_RANK)


def _with_runtime_scale(low: LowRank, a: Array, b: Array, scale: float) -> LowRank:
    """Return the update b·s·a in the place of another one."""
    tensors = {"a": a, "b": b, SCALE: np.asarray(scale, np.float32)}
    bare = replace(low, variant=RUNTIME_SCALE.name, alpha=float(a.shape[-2]))
    return RUNTIME_SCALE.with_values(bare, tensors)


def _filled_up(factor: Array, missing: int, axis: int) -> Array:
    """Return a factor with `missing` ranks of zeros after its own."""
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, missing)
    return np.pad(factor, widths)


def taken_out(key: str, low: LowRank | None, values: Mapping[str, Array]) -> LowRank | None:
    """Return the update of an adapter from the tensors of a slot.

    Args:
        key: The target.
        low: The update as it was put into the slot; None where the adapter has none.
        values: The tensors of the slot by field.

    Raises:
        LoraFxError: Numbers that are no part of the adapter are not zero any more.
    """
    rank = low.rank if low is not None else 0
    a = values["a"]
    b = values["b"]
    if a[..., rank:, :].any() or b[..., rank:].any():
        raise LoraFxError(
            f"{key!r} was trained in ranks that the active adapter does not have",
            "the compiled program has them for other adapters, and their gradient is zero: make "
            "the optimizer again after load_adapter or activate, without noise of its own",
        )
    if low is None:
        return None
    return replace(low, a=a[..., :rank, :], b=b[..., :rank])
