"""The float32 form of a bfloat16 model.

ONNX Runtime's CPU has few ops for bfloat16, so a file of such a model is in float32, which has
every bfloat16 number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.onnx.graph.flow import values_of


def in_bfloat16(model: ir.Model) -> list[ir.Value]:
    """The values of a model that are in bfloat16, bodies included."""
    return [v for v in values_of(model) if v.dtype is ir.DataType.BFLOAT16]


def widen(model: ir.Model) -> bool:
    """Make bfloat16 float32 in place, in inputs and outputs too; whether there was any."""
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    found = in_bfloat16(model)
    for value in found:
        value.dtype = wide
        if value.const_value is not None:
            value.const_value = _float32(value.const_value)
    for node in model.graph.all_nodes():
        for name, a in list(node.attributes.items()):
            if name in ("to", "dtype") and a.value == narrow:
                node.attributes[name] = ir.AttrInt64(name, int(wide))
            elif a.type is ir.AttributeType.TENSOR and a.as_tensor().dtype is narrow:
                node.attributes[name] = ir.AttrTensor(name, _float32(a.as_tensor()))
    return bool(found)


def unround(
    model: ir.Model, exact: Mapping[str, Callable[[], Array]], copies: Mapping[str, str]
) -> frozenset[str]:
    """Give weights that hold numbers of bfloat16 the float32 that these were rounded from.

    A weight that does not hold those numbers, as stored or transposed, is left as it is.

    Args:
        model: Of a bfloat16 model, widened; edited in place.
        exact: Name of a weight → what gives its value before it was rounded.
        copies: Name of another copy of a tensor → the name of that tensor.

    Returns:
        The names of `exact` of which every copy could be replaced.
    """
    kept: dict[str, bool] = {}
    for name, value in model.graph.initializers.items():
        source = copies.get(name, name)
        held = value.const_value
        if source not in exact or held is None or value.dtype is not ir.DataType.FLOAT:
            continue
        wide = exact[source]().astype(np.float32, copy=False)
        rounded, stored = wide.astype(ml_dtypes.bfloat16).astype(np.float32), held.numpy()
        if stored.shape != wide.shape or not np.array_equal(rounded, stored):
            wide, rounded = wide.T, rounded.T
        same = stored.shape == wide.shape and np.array_equal(rounded, stored)
        if same:
            value.const_value = ir.tensor(np.ascontiguousarray(wide), name=held.name)
        kept[source] = same and kept.get(source, True)
    return frozenset(name for name, same in kept.items() if same)


def _float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
