"""A bound update as a row of a manifest: all of it but its tensors, and the way back."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import from_json, to_json
from lora_fx.adapter.variant import bare, with_values
from lora_fx.dtypes import Array
from lora_fx.ir.layout import Layout
from lora_fx.text import Json, JsonView


def row_of(update: LowRank) -> Json:
    """All fields of a bound update but its tensors."""
    assert update.layout is not None
    row = to_json(update, "frozen", "rank", "alpha", "variant", "use", "extra")
    row["layout"] = list(update.layout.to_json().values())  # without names, as 0.1 reads it
    return row


def update_of(row: JsonView, values: Mapping[str, Array]) -> LowRank:
    """The update of a row and its tensors by field."""
    layout = Layout(*(tuple(axes) for axes in row["layout"]))
    fields = {**row, "layout": layout.to_json()}
    update = from_json(bare(values, row), fields)
    return with_values(update, values)
