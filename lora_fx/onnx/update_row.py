"""Conversion of a bound update, without tensors, to a row of a manifest and back."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fx.adapter.entry_json import from_json, to_json
from lora_fx.adapter.factor_tensors import with_values
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import bare
from lora_fx.dtypes import Array
from lora_fx.ir.layout import Layout
from lora_fx.text import Json, JsonView


def row_of(update: LowRank) -> Json:
    """Return all fields of a bound update, without its tensors."""
    assert update.layout is not None
    row = to_json(update, "frozen", "rank", "alpha", "variant", "use", "extra")
    row["layout"] = list(update.layout.to_json().values())  # without names, as 0.1 reads it
    return row


def update_of(row: JsonView, values: Mapping[str, Array]) -> LowRank:
    """Return the update for a row and the update's tensors by field."""
    layout = Layout(*(tuple(axes) for axes in row["layout"]))
    fields = {**row, "layout": layout.to_json()}
    update = from_json(bare(values, row), fields)
    return with_values(update, values)
