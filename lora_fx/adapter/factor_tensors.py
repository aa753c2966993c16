"""The tensors of an update in a model: their names, their values, and which of them train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_fx.adapter.lowrank import (
    LowRank,
    Updates,
)
from lora_fx.adapter.variant import VARIANTS, variant_of
from lora_fx.adapter.variant_protocol import Variant
from lora_fx.dtypes import Array
from lora_fx.ir.layout import Layout


@dataclass(frozen=True)
class FactorTensor:
    """One tensor of an update.

    Attributes:
        field: The field of the update, such as a or b.
        name: Its dotted name in a model.
        value: Its numbers.
        trained: False where it does not train.
        saved: False where it is a buffer that the state dict leaves out.
    """

    field: str
    name: str
    value: Array
    trained: bool = True
    saved: bool = True


@dataclass(frozen=True)
class Half:
    """The tensors of one branch: the trained ranks of an update, or its frozen ones.

    Attributes:
        variant: It makes a and b of the tensors.
        tensors: The tensors, by the field that the variant reads.
        rank: Columns of b.
    """

    variant: Variant
    tensors: Mapping[str, FactorTensor]
    rank: int

    @property
    def trained(self) -> bool:
        """False for the frozen ranks."""
        return any(tensor.trained for tensor in self.tensors.values())


_SIDES = {"a": "A", "b": "B", "a0": "A0", "b0": "B0"}


def tensor_name(key: str, field: str) -> str:
    """Return the dotted name of a key's tensor: `PATH.lora_A.LEAF[region]`, `PATH.lora_magnitude…`.

    The use of a shared tensor stands in the leaf, with slashes for its dots: torch allows no dot
    in the name of a parameter.

    >>> tensor_name("h.0.attn.weight[:, 0:4]", "b")
    'h.0.attn.lora_B.weight[:, 0:4]'
    >>> tensor_name("embed.weight@lm.head.weight", "a")
    'embed.lora_A.weight@lm/head/weight'
    """
    head, bracket, region = key.partition("[")
    head, at, use = head.partition("@")
    path, dot, leaf = head.rpartition(".")
    leaf += at + use.replace(".", "/")
    return f"{path}{dot}lora_{_SIDES.get(field, field)}.{leaf}{bracket}{region}"


def slot_names(key: str) -> tuple[str, str]:
    """Return the dotted names of a key's a and b."""
    return tensor_name(key, "a"), tensor_name(key, "b")


def halves(key: str, low: LowRank, *, split: bool = True) -> tuple[Half, ...]:
    """Return the tensors of the trained ranks, then those of the frozen ranks if there are any.

    Args:
        key: The key of the update.
        low: The update.
        split: False gives one half with all ranks of a and b as they are, for graphs that train
            nothing.
    """
    variant = variant_of(low) if split else VARIANTS["lora"]
    # Frozen ranks of a variant that makes a and b of other tensors are in those.
    has_frozen = split and not variant.made_of and low.frozen > 0
    if not has_frozen:
        return (_trained_half(key, variant, variant.tensors(low), low.rank),)

    rank = low.rank - low.frozen
    values = {"a": low.a[..., :rank, :], "b": low.b[..., :rank]}
    a0 = FactorTensor("a0", tensor_name(key, "a0"), low.a[..., rank:, :], False)
    b0 = FactorTensor("b0", tensor_name(key, "b0"), low.b[..., rank:], False)
    frozen = Half(variant, {"a": a0, "b": b0}, low.frozen)
    return _trained_half(key, variant, values, rank), frozen


def _trained_half(key: str, variant: Variant, values: Mapping[str, Array], rank: int) -> Half:
    """Return the half that has these values by field; the variant says which of them train."""
    tensors = {
        field: FactorTensor(
            field,
            tensor_name(key, field),
            value,
            field not in variant.still,
            field not in variant.unsaved,
        )
        for field, value in values.items()
    }
    return Half(variant, tensors, rank)


def slots_of(key: str, low: LowRank, *, split: bool = True) -> tuple[FactorTensor, ...]:
    """Return every tensor of an update, in the order of the table in `variant_protocol`.

    Args:
        key: The key of the update.
        low: The update.
        split: As in `halves`.
    """
    slots: list[FactorTensor] = []
    for half in halves(key, low, split=split):
        slots += half.tensors.values()
    variant = variant_of(low)
    for field, value in variant.beside(low).items():
        trained = field not in variant.still
        slots.append(FactorTensor(field, tensor_name(key, field), value, trained))
    return tuple(slots)


def with_values(low: LowRank, values: Mapping[str, Array]) -> LowRank:
    """Return the update with other values in its tensors.

    Args:
        low: The update.
        values: Arrays by field, for every field that `slots_of` names.
    """
    return variant_of(low).with_values(low, values)


def resized(low: LowRank, factor: float) -> LowRank:
    """Return the update with ΔW multiplied by `factor`, scaled in its existing tensors."""
    variant = variant_of(low)
    values = {slot.field: slot.value for slot in slots_of("", low)}
    for field in (variant.proportional, "b0"):
        if field in values:
            values[field] = values[field] * np.float32(factor)
    return variant.with_values(low, values)


def frame(updates: Updates) -> dict[str, tuple[object, ...]]:
    """Return the facts that fix a compiled program: all except the values of a and b.

    The scale is part of it, since it is a constant in the graph. The rank is where a weight is
    reshaped on the way to its matrix; a plain one has the same nodes at any rank.
    """
    return {key: _frame_of(key, low) for key, low in updates.items()}


def _frame_of(key: str, low: LowRank) -> tuple[object, ...]:
    """Return the facts of one update that fix a compiled program; see `frame`."""
    fields = tuple(slot.field for slot in slots_of(key, low))
    sizes = _sizes_of(key, low)
    return (sizes, low.frozen, low.scale, low.layout, low.use, low.variant, fields)


def _sizes_of(key: str, low: LowRank) -> tuple[tuple[int, ...], ...]:
    """Return the sizes of the trained tensors that a compiled program depends on."""
    trained = halves(key, low)[0].tensors
    saved = {field for field, tensor in trained.items() if tensor.saved}
    if saved != {"a", "b"}:
        return tuple(tensor.value.shape for tensor in trained.values())
    shape = trained["a"].value.shape
    if is_plain_matrix(low.layout) and not low.frozen:
        return (shape[1:],)
    return (shape,)


def is_plain_matrix(layout: Layout | None) -> bool:
    """Whether a stored weight is already a matrix, with no reshape needed."""
    if layout is None or layout.batch:
        return False
    return len(layout.in_) == 1 and len(layout.out) == 1
