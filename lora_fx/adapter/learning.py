"""How updates are trained, kept in an adapter's metadata because no file format stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lora_fx.adapter.lowrank import (
    LowRank,
    Updates,
)
from lora_fx.adapter.variant import VARIANTS, named_variant
from lora_fx.text import Json, JsonView

LEARNS = "learns"
"""The metadata field that keeps how the updates are trained."""


def learning(updates: Updates) -> Json:
    """Metadata from which `relearning` makes the variants and the frozen ranks again."""
    variants = {
        key: low.variant
        for key, low in updates.items()
        if named_variant(low.variant).learns_as_lora
    }
    frozen = {key: low.frozen for key, low in updates.items() if low.frozen}
    if not variants and not frozen:
        return {}
    return {LEARNS: {"variants": variants, "frozen": frozen}}


def relearning(updates: Updates, metadata: JsonView) -> tuple[dict[str, LowRank], Json]:
    """(updates that train as the metadata says, metadata without that field)."""
    variants = _facts_by_key(metadata, "variants")
    frozen_ranks = _facts_by_key(metadata, "frozen")
    result = {}
    for key, low in updates.items():
        variant = VARIANTS.get(str(variants.get(key, "")))
        if low.variant == "lora" and variant is not None and variant.learns_as_lora:
            low = replace(low, variant=variant.name)
        frozen = frozen_ranks.get(key)
        if isinstance(frozen, int) and 0 < frozen < low.rank:
            low = replace(low, frozen=frozen)
        result[key] = low
    return result, {name: value for name, value in metadata.items() if name != LEARNS}


def _facts_by_key(metadata: JsonView, fact: str) -> JsonView:
    """Key → what `learning` wrote; empty if the metadata has something else there."""
    learns = metadata.get(LEARNS)
    if not isinstance(learns, Mapping):
        return {}
    facts = learns.get(fact)
    return facts if isinstance(facts, Mapping) else {}
