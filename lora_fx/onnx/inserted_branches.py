"""Branches that insert put into an .onnx file: their list in the metadata, and the way back.

A is [*batch, rank, in] and B [*batch, out, rank], as in an Adapter; the scale is a node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.factor_tensors import slots_of
from lora_fx.adapter.learning import learning
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import expect_variant, fields_of_files
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, stamp
from lora_fx.onnx.load import load
from lora_fx.onnx.manifest import PROPERTY, read_manifest
from lora_fx.onnx.update_row import row_of, update_of
from lora_fx.onnx.validity import blaming
from lora_fx.text import Json, JsonView


def branches_as_json(updates: Mapping[str, LowRank], metadata: JsonView) -> str:
    """The bound updates by key, and their adapter's metadata, as JSON for the model's metadata."""
    targets: dict[str, Json] = {}
    for key, update in updates.items():
        tensor_names = {slot.field: slot.name for slot in slots_of(key, update)}
        targets[key] = {**tensor_names, **row_of(update)}
    return json.dumps({**stamp(), "mode": "insert", "targets": targets, "metadata": metadata})


@blaming
def adapter_in(path: str | PathLike[str]) -> Adapter:
    """Read the trained adapter from the branches of a file that insert wrote.

    Raises:
        LoraFxError: The file has no such branches, or one was renamed.
    """
    model = load(path)
    text = model.metadata_props.get(PROPERTY)
    manifest: Json = {}
    if text:
        manifest = read_manifest(text, str(path))
    if manifest.get("mode") != "insert":
        raise LoraFxError(
            f"{path}: an ONNX file without trainable branches",
            "add them with lora-fx insert X.onnx -o Y.onnx; or give the model first, as lora-fx "
            "merge takes it",
        )

    updates: dict[str, LowRank] = {}
    for key, row in manifest["targets"].items():
        expect_variant(str(row["variant"]), f"{path}: the update of {key!r}")
        tensors = {
            field: _tensor(model, row[field], path) for field in fields_of_files() if field in row
        }
        updates[key] = update_of(row, tensors)
    return Adapter(updates, {**manifest.get("metadata", {}), **learning(updates)})


def _tensor(model: ir.Model, name: str, path: str | PathLike[str]) -> Array:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise LoraFxError(f"{path}: tensor {name!r} is missing", "was it renamed?")
    return np.array(value.const_value.numpy(), np.float32)
