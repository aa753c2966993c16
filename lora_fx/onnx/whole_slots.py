"""The slots of whole tensors in a switchable graph: parameters that an adapter replaces.

The graph has each as an initialiser in the shape of the parameter, from which nothing was computed
beforehand. So a value in its place, given to a run or to a session, takes effect wherever the model
reads the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import dtype_name
from lora_fx.onnx.manifest import WholeSlot


def whole_slots(graph: OnnxGraph, tensors: Mapping[str, WholeSlot]) -> dict[str, WholeSlot]:
    """Return slots with the shapes and dtypes that the graph has.

    Args:
        graph: It has an initialiser for each.
        tensors: Key → a slot with the name of the initialiser.

    Raises:
        LoraFxError: A tensor that the graph does not have, or that a body hides.
    """
    slots: dict[str, WholeSlot] = {}
    for key, slot in tensors.items():
        value = graph.model.graph.initializers.get(slot.name)
        if value is None or value.shape is None:
            raise LoraFxError(
                f"{key!r}: an adapter replaces this tensor, which the exported graph does not have",
                f"run lora-fx convert ADAPTER -o OUT --exclude {key} to leave it out; or use mode "
                "merged",
            )
        shape = tuple(int(size) for size in value.shape.numpy())
        slots[key] = WholeSlot(slot.name, shape, dtype_name(value), slot.aliases)
    return slots


def make_inputs(
    graph: OnnxGraph, slots: Mapping[str, WholeSlot], *, required: bool
) -> dict[str, Array]:
    """Make the tensors of slots inputs; return the base's values of those without a default.

    Args:
        graph: Edited in place.
        slots: The slots.
        required: The inputs have no defaults, as those of A and B in `without_defaults`.
    """
    owner = graph.model.graph
    base: dict[str, Array] = {}
    for slot in slots.values():
        value = owner.initializers[slot.name]
        value.type = ir.TensorType(ir.DataType.from_numpy(numpy_dtype(slot.dtype)))
        owner.inputs.append(value)
        if required:
            assert value.const_value is not None  # it is an initialiser
            base[slot.name] = np.array(value.const_value.numpy())
            del owner.initializers[slot.name]
            value.const_value = None
    graph.changed()
    return base
