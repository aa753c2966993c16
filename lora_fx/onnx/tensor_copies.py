"""Constants of an exported file that are copies of one tensor, and merging them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.new_names import NewNames
from lora_fx.targets.keys import base_name

COPY_OF = "lora_fx.copy_of"
"""The metadata key of a constant that copies another tensor: that tensor's name."""


def copies_of(model: ir.Model) -> dict[str, str]:
    """Return initialiser → the tensor that it copies."""
    tensors_by_copy = {}
    for value in model.graph.initializers.values():
        if COPY_OF in value.metadata_props:
            tensors_by_copy[str(value.name)] = value.metadata_props[COPY_OF]
    return tensors_by_copy


def join_copies(model: ir.Model, names: Iterable[str]) -> None:
    """Store a tensor once if copies distinguished its uses and the exporter kept them unchanged.

    Args:
        model: The model, edited in place.
        names: The names of the copies, `NAME@USE`.
    """
    stored = model.graph.initializers
    for name in names:
        copy = stored[name]
        first = stored.get(base_name(name))
        if first is copy or copy.const_value is None:
            continue
        if first is None or first.const_value is None:
            copy.name = base_name(name)
            continue
        copied = copy.const_value.numpy()
        tensor = first.const_value.numpy()
        if np.array_equal(copied, tensor):
            copy.replace_all_uses_with(first)
            del stored[name]
        elif copied.ndim == 2 and np.array_equal(copied.T, tensor):
            _replace_by_transpose(model, first, copy)
            copy.name = base_name(name)


def _replace_by_transpose(model: ir.Model, first: ir.Value, copy: ir.Value) -> None:
    """Let users of an initialiser read the transpose of its copy, by a node before all others.

    The exporter turns a weight that one product reads.
    """
    transpose = ir.Node("", "Transpose", [copy])
    result = transpose.outputs[0]
    result.name = NewNames(model).take(f"{first.name}_turned")
    result.shape = first.shape
    result.type = first.type
    model.graph.insert_before(model.graph[0], transpose)
    first.replace_all_uses_with(result)
    del model.graph.initializers[str(first.name)]
