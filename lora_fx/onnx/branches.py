"""Branches that insert put into an .onnx file: their list in the metadata, and the adapter again.

A is [*batch, rank, in] and B [*batch, out, rank], as in an Adapter; the scale is a node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.factors import FIELDS, learning, slots_of, with_values
from lora_fx.adapter.lowrank import LowRank
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import Layout
from lora_fx.manifest import PROPERTY, VERSION
from lora_fx.onnx.load import load


def listed(updates: Mapping[str, LowRank]) -> str:
    """JSON, for the model's metadata: bound updates by key."""
    targets = {}
    for key, u in updates.items():
        layout = u.layout
        assert layout is not None
        parts = [layout.shape, layout.batch, layout.out, layout.in_, layout.stored]
        targets[key] = {
            **{slot.field: slot.name for slot in slots_of(key, u)}, "frozen": u.frozen,
            "rank": u.rank, "alpha": u.alpha, "variant": u.variant, "use": u.use, "layout": parts,
        }  # fmt: skip
    return json.dumps({"version": VERSION, "mode": "insert", "targets": targets})


def adapter_in(path: str | PathLike[str]) -> Adapter:
    """The adapter whose branches are in a file that insert wrote, trained since.

    Raises:
        LoraFxError: The file has no such branches, or one was renamed.
    """
    model = load(path)
    try:
        found = json.loads(model.metadata_props.get(PROPERTY, "{}"))
    except ValueError:
        found = {}
    if found.get("mode") != "insert":
        raise LoraFxError(
            f"{path}: an ONNX file without trainable branches",
            "lora-fx insert X.onnx -o Y.onnx adds them; lora-fx merge takes the model as its base",
        )
    entries = {}
    for key, row in found["targets"].items():
        values = {f: _tensor(model, row[f], path) for f in FIELDS if f in row}
        layout = Layout(*(tuple(part) for part in row["layout"]))
        low = LowRank(
            values["a"], values["b"], row["alpha"], layout, row["variant"], row["use"],
            frozen=row.get("frozen", 0),
        )  # fmt: skip
        entries[key] = with_values(low, values)
    return Adapter(entries, learning(entries))


def _tensor(model: ir.Model, name: str, path: str | PathLike[str]) -> Array:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise LoraFxError(f"{path}: tensor {name!r} is missing", "was it renamed?")
    return np.array(value.const_value.numpy(), np.float32)
