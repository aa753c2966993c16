"""Conversion of a bfloat16 model to float32.

ONNX Runtime's CPU has few ops for bfloat16, so a file of such a model is in float32, which has
every bfloat16 number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.onnx.graph.values import values_of


def in_bfloat16(model: ir.Model) -> list[ir.Value]:
    """Return the values of a model with dtype bfloat16, bodies included."""
    return [value for value in values_of(model) if value.dtype is ir.DataType.BFLOAT16]


def widen(model: ir.Model) -> bool:
    """Convert bfloat16 to float32 in place, in inputs and outputs too; return whether any was."""
    values = in_bfloat16(model)
    for value in values:
        value.dtype = ir.DataType.FLOAT
        if value.const_value is not None:
            value.const_value = _float32_when_read(value.const_value)
    for node in model.graph.all_nodes():
        _widen_attributes(node)
    return bool(values)


def _widen_attributes(node: ir.Node) -> None:
    """Convert bfloat16 to float32 in a node's attributes: dtypes and tensors."""
    for name, attribute in list(node.attributes.items()):
        if name in ("to", "dtype") and attribute.value == ir.DataType.BFLOAT16:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        elif attribute.type is ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype is ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _float32(tensor))


def unround(
    model: ir.Model, exact: Mapping[str, Callable[[], Array]], copies: Mapping[str, str]
) -> frozenset[str]:
    """Replace weights that were rounded to bfloat16 by their exact float32 values.

    A weight is left unchanged if neither it nor its transpose is the rounding of the exact values.

    Args:
        model: Of a bfloat16 model, widened; edited in place.
        exact: Name of a weight → what gives its value before it was rounded.
        copies: Name of another copy of a tensor → the name of that tensor.

    Returns:
        The names of `exact` of which every copy could be replaced.
    """
    every_copy_replaced: dict[str, bool] = {}
    for name, value in model.graph.initializers.items():
        source = copies.get(name, name)
        stored = value.const_value
        if source not in exact or stored is None or value.dtype is not ir.DataType.FLOAT:
            continue
        unrounded = _unrounded(stored.numpy(), exact[source])
        if unrounded is not None:
            value.const_value = _when_read(unrounded, stored)
        replaced = unrounded is not None
        every_copy_replaced[source] = replaced and every_copy_replaced.get(source, True)
    return frozenset(name for name, replaced in every_copy_replaced.items() if replaced)


def _unrounded(stored: Array, exact: Callable[[], Array]) -> Callable[[], Array] | None:
    """Return a function that gives the exact values as stored; None if they round to others."""

    def wide() -> Array:
        return exact().astype(np.float32, copy=False)

    rounded = wide().astype(ml_dtypes.bfloat16).astype(np.float32)
    if np.array_equal(rounded, stored):
        return wide
    if np.array_equal(rounded.T, stored):
        return lambda: wide().T
    return None


def _float32_when_read(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return _when_read(lambda: tensor.numpy().astype(np.float32), tensor)


def _when_read(compute: Callable[[], Array], tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return a float32 tensor that is computed each time it is read.

    Those of a whole model would be in memory beside it, in twice its bytes. A file is written one
    tensor after the other.
    """

    def computed() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(compute()), name=tensor.name)

    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(computed, ir.DataType.FLOAT, shape, name=tensor.name)


def _float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
