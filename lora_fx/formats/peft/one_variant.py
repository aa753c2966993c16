"""The one variant that a PEFT config can give for a whole adapter."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import named_variant, variant_of
from lora_fx.errors import LoraFxError


def one_own_variant(updates: Mapping[str, LowRank]) -> str:
    """The one variant that PEFT does not have; empty if PEFT has the variants of all updates."""
    keys: dict[str, str] = {}
    for key, update in updates.items():
        variant = variant_of(update)
        if not variant.peft_type:
            keys.setdefault(variant.name, key)
    if len(keys) > 1:
        (first_variant, first_key), (second_variant, second_key), *_ = keys.items()
        raise LoraFxError(
            f"{first_key!r} has variant {first_variant!r} and {second_key!r} has variant "
            f"{second_variant!r}; expected one: a file has one variant for the whole adapter",
            "save them as two adapters",
        )
    return next(iter(keys), "")


def all_or_none(has: Mapping[str, bool], what: str = "DoRA") -> bool:
    """True where every update has it; raises where only some do."""
    keys_with = [key for key, is_so in has.items() if is_so]
    keys_without = [key for key, is_so in has.items() if not is_so]
    if keys_with and keys_without:
        raise LoraFxError(
            f"{keys_with[0]!r} is {what} and {keys_without[0]!r} is not; expected one kind: PEFT "
            "has one flag for the whole adapter",
            "save them as two adapters",
        )
    return bool(keys_with)


def one_variant(updates: Mapping[str, LowRank]) -> str:
    """The scale of all updates, lora or rslora; the file does not store how updates are trained."""
    keys: dict[str, str] = {}
    for key, update in updates.items():
        if not variant_of(update).peft_type:
            continue
        name = named_variant(update.variant).name
        if name == "dora":  # an update with a magnitude is DoRA's; its variant says the scale
            raise LoraFxError(
                f"the update of {key!r} has variant 'dora'; expected lora or rslora, and a "
                "magnitude",
                "create it with insert(variant='dora'), which sets both",
            )
        scale_variant = "rslora" if name == "rslora" else "lora"
        keys.setdefault(scale_variant, key)
    if len(keys) > 1:
        raise LoraFxError(
            f"{keys['lora']!r} is lora and {keys['rslora']!r} is rslora; expected one variant: "
            "PEFT has one flag for the whole adapter",
            "save them as two adapters",
        )
    return next(iter(keys), "lora")
