"""What one config of PEFT can say of the variants in a whole adapter."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import named_variant, variant_of
from lora_fx.errors import LoraFxError


def one_own_variant(updates: Mapping[str, LowRank]) -> str:
    """The one variant that PEFT does not have; empty where PEFT has those of all updates."""
    keys: dict[str, str] = {}
    for key, low in updates.items():
        variant = variant_of(low)
        if not variant.peft_type:
            keys.setdefault(variant.name, key)
    if len(keys) > 1:
        (one, first), (other, second), *_ = keys.items()
        raise LoraFxError(
            f"{first!r} is of variant {one!r} and {second!r} of variant {other!r}; expected one: a "
            "file says one for the whole adapter",
            "save them as two adapters",
        )
    return next(iter(keys), "")


def all_or_none(has: Mapping[str, bool], what: str = "DoRA") -> bool:
    """True where every update has it; raises where only some do."""
    if any(has.values()) and not all(has.values()):
        yes, no = (next(k for k, v in has.items() if v is want) for want in (True, False))
        raise LoraFxError(
            f"{yes!r} is {what} and {no!r} is not; expected one kind: PEFT has one flag for the "
            "whole adapter",
            "save them as two adapters",
        )
    return any(has.values())


def one_variant(updates: Mapping[str, LowRank]) -> str:
    """The one scale of all updates, lora or rslora; how an update learns is not in the file."""
    first: dict[str, str] = {}
    for key, low in updates.items():
        if not variant_of(low).peft_type:
            continue
        name = named_variant(low.variant).name
        if name == "dora":  # an update with a magnitude is DoRA's; its variant says the scale
            raise LoraFxError(
                f"the update of {key!r} is of variant 'dora'; expected lora or rslora, and a "
                "magnitude",
                "insert(variant='dora') makes both",
            )
        first.setdefault(name if name == "rslora" else "lora", key)
    if len(first) > 1:
        raise LoraFxError(
            f"{first['lora']!r} is lora and {first['rslora']!r} is rslora; expected one variant: "
            "PEFT has one flag for the whole adapter",
            "save them as two adapters",
        )
    return next(iter(first), "lora")
