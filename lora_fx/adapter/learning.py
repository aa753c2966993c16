"""How updates learn, in the metadata of an adapter: no format of files says it."""

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
