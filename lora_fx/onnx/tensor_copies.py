"""Constants of an exported file that are copies of one tensor: which, and stored once again."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from lora_fx.targets.target import base_name

COPY_OF = "lora_fx.copy_of"
"""Metadata key of a constant that is another copy of a tensor, with that tensor's name."""


def copies_of(model: ir.Model) -> dict[str, str]:
    """For each initialiser that is another copy of a tensor, the name of that tensor."""
    values = model.graph.initializers.values()
    return {str(v.name): v.metadata_props[COPY_OF] for v in values if COPY_OF in v.metadata_props}


def join_copies(model: ir.Model, names: Iterable[str]) -> None:
    """Store once what has copies that told its uses apart, where the exporter left it as it was.

    Args:
        model: The model, edited in place.
        names: Of the copies, `NAME@USE`.
    """
    stored = model.graph.initializers
    for name in names:
        copy, first = stored[name], stored.get(base_name(name))
        if first is copy or copy.const_value is None:
            continue
        if first is not None and first.const_value is not None:
            ours, theirs = copy.const_value.numpy(), first.const_value.numpy()
            if np.array_equal(ours, theirs):
                copy.replace_all_uses_with(first)
                del stored[name]
                continue
            if ours.ndim != 2 or not np.array_equal(ours.T, theirs):
                continue
            turned = ir.Node("", "Transpose", [copy])  # the exporter turns what one product reads
            turned.outputs[0].name = f"{first.name}_turned"
            turned.outputs[0].shape, turned.outputs[0].type = first.shape, first.type
            model.graph.insert_before(model.graph[0], turned)
            first.replace_all_uses_with(turned.outputs[0])
            del stored[str(first.name)]
        copy.name = base_name(name)
