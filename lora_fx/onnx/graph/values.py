"""Readers of an ONNX model's values and nodes: shapes, dtypes, constants, operands."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.ir.einsum import Shape


def bodies_of(node: ir.Node) -> list[ir.Graph]:
    """Return the graphs that an If, a Loop or a Scan runs; empty for other ops."""
    bodies: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            bodies.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            bodies += attribute.as_graphs()
    return bodies


def shape_of(value: ir.Value | None) -> Shape | None:
    """Return the sizes of a value, numbers or symbols; None if the file does not give them."""
    if value is None or value.shape is None:
        return None
    return tuple(value.shape)


def values_of(model: ir.Model) -> list[ir.Value]:
    """Return all inputs, initialisers and node results, bodies included."""
    values: dict[ir.Value, None] = {}
    for graph in model.graphs():
        values |= dict.fromkeys(graph.inputs)
        values |= dict.fromkeys(graph.initializers.values())
    made_by_nodes: list[ir.Value] = []
    for node in model.graph.all_nodes():
        made_by_nodes += node.outputs
    return [*values, *made_by_nodes]


def rank(value: ir.Value | None) -> int | None:
    """Return the number of dimensions of a value; None if it is unknown."""
    if value is None or value.shape is None:
        return None
    return len(value.shape)


def operand(node: ir.Node, slot: int) -> ir.Value | None:
    """Return the operand in a slot; None if the node leaves it out."""
    if slot >= len(node.inputs):
        return None
    return node.inputs[slot]


def made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    """Return the node that makes a value, if it is this ONNX op."""
    if value is None:
        return None
    node = value.producer()
    if node is None or node.op_type != op or node.domain:
        return None
    return node


def remove_unread(node: ir.Node | None) -> None:
    """Remove a node without readers, and then earlier nodes without readers."""
    if node is None or node.graph is None:  # it may have been removed already, before another node
        return
    if any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    producers = [value.producer() for value in node.inputs if value is not None]
    node.graph.remove(node, safe=True)
    for producer in producers:
        remove_unread(producer)


def delete_unread(value: ir.Value | None) -> None:
    """Delete an initialiser without readers, about which ONNX Runtime warns at every load."""
    if value is None or not value.is_initializer():
        return
    if not value.uses() and not value.is_graph_output() and value.graph is not None:
        del value.graph.initializers[str(value.name)]


def constant(value: ir.Value | None) -> Array | None:
    """Return the array of an initialiser or a Constant; None for other values."""
    # an initialiser that is an input too can be overridden in every run: no constant
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None
    return tensor.numpy()


def numbers(
    node: ir.Node, name: str, slot: int, absent: list[int] | None = None
) -> list[int] | None:
    """Return an op's integers from an attribute, or from an operand in later opsets.

    None where they are not known, and `absent` where the node leaves them out.
    """
    if name in node.attributes:
        attribute = node.attributes[name].value
        if isinstance(attribute, int):
            return [int(attribute)]
        return [int(number) for number in attribute]
    value = operand(node, slot)
    if value is None:
        return absent
    array = constant(value)
    if array is None:
        return None
    return [int(number) for number in array.reshape(-1)]


def is_tensor(value: ir.Value) -> bool:
    """Whether a value is a tensor (no sequence or optional), as far as the model says."""
    return not isinstance(value.type, (ir.SequenceType, ir.OptionalType))


def dtype_name(value: ir.Value | None) -> str:
    """Return the name of a tensor's dtype; empty if unknown, and for a sequence."""
    if value is None:
        return ""
    dtype = value.dtype if is_tensor(value) else None
    if dtype is None and value.const_value is not None:
        dtype = value.const_value.dtype
    if dtype is None:
        return ""
    return tensor_dtype(dtype)


def tensor_dtype(dtype: ir.DataType) -> str:
    """Return the name of a dtype in numpy, or in ONNX if numpy has none."""
    try:
        return str(dtype.numpy().name)
    except (TypeError, KeyError):
        return dtype.name.lower()
