"""What one config of PEFT can say of a whole adapter, and what not."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.variant import named_variant
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft_config import conflicts


def split_full(full: Mapping[str, Full], modules: set[str]) -> tuple[list[str], dict[str, str]]:
    """Modules that PEFT can save whole, and {key: reason} of the tensors it cannot."""
    holders = {k: k.rpartition(".")[0] for k in full}
    weighty = {holders[k] for k in full if k.endswith(".weight")}
    odd: dict[str, str] = {}
    for key, holder in holders.items():
        clash = next((m for m in sorted(modules) if holder and conflicts(holder, m)), None)
        if clash:
            odd[key] = f"modules_to_save {holder!r} would take the update off {clash!r}"
        elif not holder or holder not in weighty:
            odd[key] = "it is not a module with its weight, and PEFT saves modules whole"
    chosen = sorted({h for k, h in holders.items() if k not in odd})
    # A module inside a saved one is saved with it; listing both makes PEFT wrap it twice.
    return [m for m in chosen if not any(m.startswith(f"{o}.") for o in chosen)], odd


def partial(whole: list[str], full: Mapping[str, Full]) -> list[str]:
    """Notes on modules of which the adapter may hold only some tensors."""
    notes = []
    for module in whole:
        leaves = sorted(k.removeprefix(f"{module}.") for k in full if k.startswith(f"{module}."))
        if leaves != ["bias", "weight"]:
            notes.append(
                f"PEFT will load modules_to_save {module!r} only if the module has no other "
                f"tensors than {', '.join(leaves)}"
            )
    return notes


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
