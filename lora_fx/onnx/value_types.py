"""Types and shapes of ONNX values: told apart, remembered, and given to other values."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

Types = Sequence[tuple[ir.Shape | None, ir.TypeProtocol | None]]
"""The shape and the type of each value that a node gives."""


def types_of(values: Iterable[ir.Value]) -> Types:
    """Copies of the shapes and types that values have now."""
    return [(None if v.shape is None else v.shape.copy(), copy.copy(v.type)) for v in values]


def give_types(types: Types, values: Iterable[ir.Value]) -> None:
    """Let values have types; copies, since the exporter changes them in place."""
    for v, (shape, of) in zip(values, types, strict=True):
        v.shape, v.type = None if shape is None else shape.copy(), copy.copy(of)


def described(x: Any, order: Mapping[Any, int]) -> Hashable:
    """What can be told of arguments, equal for arguments that an operator treats alike.

    Args:
        x: An argument, or a list or mapping of them.
        order: Value → its place among the values of all arguments.

    Returns:
        Of a value its place, type, shape and constant number; of a number or a text itself. What
        else there is, a tensor, a body or a type, is like nothing else.
    """
    if isinstance(x, (list, tuple)):
        return tuple(described(y, order) for y in x)
    if isinstance(x, Mapping):
        return tuple((k, described(y, order)) for k, y in x.items())
    if x is None or isinstance(x, (bool, int, float, str)):
        return type(x), repr(x)
    if not hasattr(x, "const_value"):
        return object()
    known, shape = x.const_value, None
    if x.shape is not None:
        shape = tuple(d if isinstance(d, int) else str(d) for d in x.shape)
    number = repr(known.numpy().tolist()) if known is not None and known.size <= 20 else None
    return order[x], type(x.type), x.dtype, repr(x.name == ""), shape, number
