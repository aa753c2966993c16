"""Where the tensors of an update live beside the parameter: their names, values, what trains.

==========  ==========================  ==================  ============================
field       name                        shape               trained
==========  ==========================  ==================  ============================
a           PATH.lora_A.LEAF            [*batch, r, in]     yes, but for lora-fa; of QA-LoRA
                                        [*batch, r, in/group]
b           PATH.lora_B.LEAF            [*batch, out, r]    yes
a0, b0      PATH.lora_A0.LEAF, …        the same            no: the last `frozen` ranks
magnitude   PATH.lora_magnitude.LEAF    [*batch, out]       yes
==========  ==========================  ==================  ============================

r is the trained rank. An update whose start was taken from W or its gradient has −b₀a₀ in its
frozen ranks, so that ΔW is zero at first while W stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.lowrank import LowRank, alpha_of
from lora_fx.dtypes import Array
from lora_fx.text import Json, JsonView

FIELDS = ("a", "b", "a0", "b0", "magnitude")
SIDES = ("lora_A", "lora_B", "lora_A0", "lora_B0", "lora_magnitude")
"""Names of the modules beside the parameter that hold the tensors of an update."""


@dataclass(frozen=True)
class FactorTensor:
    """One tensor of an update: which it is, its dotted name, its value, whether it trains."""

    field: str
    name: str
    value: Array
    trained: bool = True


@dataclass(frozen=True)
class Half:
    """Two factors that make one branch: the trained ranks of an update, or its frozen ones.

    Of QA-LoRA `a` is [*batch, r, in/group], and each of its columns is that of `group` inputs.
    """

    a: FactorTensor
    b: FactorTensor
    group: int = 0

    @property
    def rank(self) -> int:
        """Columns of b."""
        return int(self.b.value.shape[-1])

    @property
    def trained(self) -> bool:
        """False for the frozen ranks."""
        return self.b.trained


def slots_of(key: str, low: LowRank) -> tuple[FactorTensor, ...]:
    """Every tensor of an update, in the order of the table above."""
    slots = [slot for half in halves(key, low) for slot in (half.a, half.b)]
    if low.magnitude is not None:
        slots.append(FactorTensor("magnitude", _name(key, "magnitude"), low.magnitude))
    return tuple(slots)


def halves(key: str, low: LowRank, *, split: bool = True) -> tuple[Half, ...]:
    """The trained ranks of an update, then the frozen ones if it has such.

    Args:
        key: The key of the update.
        low: The update.
        split: False gives one half with all ranks, for graphs that train nothing.
    """
    first, second = slot_names(key)
    r = low.rank - low.frozen if split else low.rank
    pooled = low.pooled if split else None
    whole, group = (low.a, 0) if pooled is None else (pooled, low.group)
    a = FactorTensor("a", first, whole[..., :r, :], low.variant != "lora-fa")
    top = Half(a, FactorTensor("b", second, low.b[..., :r]), group)
    if r == low.rank:
        return (top,)
    a0 = FactorTensor("a0", _name(key, "A0"), whole[..., r:, :], False)
    return (top, Half(a0, FactorTensor("b0", _name(key, "B0"), low.b[..., r:], False), group))


def with_values(low: LowRank, values: Mapping[str, Array]) -> LowRank:
    """The update with other numbers.

    Args:
        low: The update.
        values: Arrays by field, for every field that `slots_of` names.
    """
    a, b = values["a"], values["b"]
    if low.frozen:
        a = np.concatenate([a, values["a0"]], axis=-2)
        b = np.concatenate([b, values["b0"]], axis=-1)
    width = low.layout.in_size if low.layout else low.a.shape[-1]
    if a.shape[-1] * low.group == width:
        a = np.repeat(a, low.group, -1)
    return replace(low, a=a, b=b, magnitude=values.get("magnitude"))


def asked(low: LowRank) -> tuple[int, float]:
    """Rank and alpha without the frozen ranks, as whoever inserted the update gave them."""
    rank = low.rank - low.frozen
    return rank, low.asked if not low.frozen else alpha_of(low.scale, rank, low.variant)


LEARNS = "learns"
"""The adapter metadata that keeps what no format says: how the updates learn."""


def learning(updates: Mapping[str, LowRank]) -> Json:
    """Metadata from which `relearning` makes the variants and the frozen ranks again."""
    variants = {k: u.variant for k, u in updates.items() if u.variant not in ("lora", "rslora")}
    frozen = {k: u.frozen for k, u in updates.items() if u.frozen}
    return {LEARNS: {"variants": variants, "frozen": frozen}} if variants or frozen else {}


def relearning(
    updates: Mapping[str, LowRank], metadata: JsonView
) -> tuple[dict[str, LowRank], Json]:
    """Updates that learn as the metadata says, and the rest of the metadata."""
    said = metadata.get(LEARNS) or {}
    variants, frozen = said.get("variants", {}), said.get("frozen", {})
    result = {}
    for key, u in updates.items():
        if u.variant == "lora" and variants.get(key) in ("lora-fa", "lora+"):
            u = replace(u, variant=variants[key])
        if isinstance(frozen.get(key), int) and 0 < frozen[key] < u.rank:
            u = replace(u, frozen=frozen[key])
        result[key] = u
    return result, {k: v for k, v in metadata.items() if k != LEARNS}


def frame(updates: Mapping[str, LowRank]) -> dict[str, tuple[object, ...]]:
    """All of the updates that a program depends on: everything but the numbers in a and b.

    The scale is part of it, since it is a constant in the graph. The rank is where a weight is
    reshaped on the way to its matrix; a plain one has the same nodes at any rank.
    """

    def width(u: LowRank, shape: tuple[int, ...]) -> tuple[int, ...]:
        held = u.layout
        plain = held and len(held.in_) == len(held.out) == 1 and not held.batch
        return shape[1:] if plain and not u.frozen else shape

    return {
        k: (width(u, halves(k, u)[0].a.value.shape), u.frozen, u.scale, u.layout, u.use, u.variant,
            u.magnitude is None)
        for k, u in updates.items()
    }  # fmt: skip


def slot_names(key: str) -> tuple[str, str]:
    """The dotted names of a key's a and b: `PATH.lora_A.LEAF[region]`, `PATH.lora_B.…`.

    The use of a shared tensor stands in the leaf, with slashes for its dots: torch allows no dot
    in the name of a parameter.

    >>> slot_names("h.0.attn.weight[:, 0:4]")
    ('h.0.attn.lora_A.weight[:, 0:4]', 'h.0.attn.lora_B.weight[:, 0:4]')
    >>> slot_names("embed.weight@lm.head.weight")[0]
    'embed.lora_A.weight@lm/head/weight'
    """
    return _name(key, "A"), _name(key, "B")


def _name(key: str, side: str) -> str:
    head, bracket, region = key.partition("[")
    head, at, use = head.partition("@")
    path, dot, leaf = head.rpartition(".")
    leaf += at + use.replace(".", "/")
    return f"{path}{dot}lora_{side}.{leaf}{bracket}{region}"
