"""Types and shapes of ONNX values: comparison, copies, and assignment to other values."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

Types = Sequence[tuple[ir.Shape | None, ir.TypeProtocol | None]]
"""The shape and the type of each output value of a node."""


def types_of(values: Iterable[ir.Value]) -> Types:
    """Return copies of the current shapes and types of values."""
    return [(_copied(value.shape), copy.copy(value.type)) for value in values]


def give_types(types: Types, values: Iterable[ir.Value]) -> None:
    """Set the types of values to copies, because the exporter changes types in place."""
    for value, (shape, value_type) in zip(values, types, strict=True):
        value.shape = _copied(shape)
        value.type = copy.copy(value_type)


def _copied(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else shape.copy()


def described(argument: Any, order: Mapping[Any, int]) -> Hashable:
    """Return a description that is equal for arguments that an operator treats alike.

    Args:
        argument: An argument, or a list or mapping of them.
        order: Value → its place among the values of all arguments.

    Returns:
        Of a value its place, type, shape and constant numbers; of a number or a text its type and
        itself. Anything else (a tensor, a body, a type) is like nothing else.
    """
    if isinstance(argument, (list, tuple)):
        return tuple(described(item, order) for item in argument)
    if isinstance(argument, Mapping):
        return tuple((name, described(item, order)) for name, item in argument.items())
    if argument is None or isinstance(argument, (bool, int, float, str)):
        return type(argument), repr(argument)
    if not hasattr(argument, "const_value"):
        return object()
    return order[argument], _described_value(argument)


def _described_value(value: ir.Value) -> Hashable:
    """Return all properties of a value except its position."""
    shape = None
    if value.shape is not None:
        shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    tensor = value.const_value
    numbers = None
    if tensor is not None and tensor.size <= 20:
        numbers = repr(tensor.numpy().tolist())
    return type(value.type), value.dtype, repr(value.name == ""), shape, numbers
