"""What an ONNX model says of its values and nodes: shapes, dtypes, constants, operands."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.ir.kinds import Shape


def bodies_of(node: ir.Node) -> list[ir.Graph]:
    """The graphs that an If, a Loop or a Scan runs; empty for other ops."""
    bodies: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            bodies.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            bodies += attribute.as_graphs()
    return bodies


def shape_of(value: ir.Value | None) -> Shape | None:
    """The sizes of a value, whole numbers or symbols; None where the file does not say."""
    return None if value is None or value.shape is None else tuple(value.shape)


def values_of(model: ir.Model) -> list[ir.Value]:
    """Inputs, initialisers and what nodes make, bodies included."""
    stored = [v for g in model.graphs() for v in (*g.inputs, *g.initializers.values())]
    return [*dict.fromkeys(stored), *(v for n in model.graph.all_nodes() for v in n.outputs)]


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions of a value; None where it is unknown."""
    return None if value is None or value.shape is None else len(value.shape)


def operand(node: ir.Node, slot: int) -> ir.Value | None:
    """The operand in a slot; None where the node leaves it out."""
    return node.inputs[slot] if slot < len(node.inputs) else None


def made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that makes a value, where it is this op of ONNX."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and not node.domain else None


def remove_unread(node: ir.Node | None) -> None:
    """Remove a node that nothing reads, and those before it that nothing reads then."""
    if node is None or node.graph is None:  # it may have been removed as what is before another
        return
    if any(v.uses() or v.is_graph_output() for v in node.outputs):
        return
    before = [v.producer() for v in node.inputs if v is not None]
    node.graph.remove(node, safe=True)
    for maker in before:
        remove_unread(maker)


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initialiser or a Constant; None for anything else."""
    # an initialiser that is an input too can be overridden in every run: no constant
    if value is None or value.is_graph_input():
        return None
    found = ir.convenience.get_const_tensor(value)
    return None if found is None else found.numpy()


def numbers(
    node: ir.Node, name: str, slot: int, absent: list[int] | None = None
) -> list[int] | None:
    """The whole numbers that an op takes as an attribute, or as an operand in later opsets.

    None where they are not known, and `absent` where the node leaves them out.
    """
    if name in node.attributes:
        found = node.attributes[name].value
        return [int(found)] if isinstance(found, int) else [int(n) for n in found]
    given = operand(node, slot)
    value = constant(given)
    if value is None:
        return absent if given is None else None
    return [int(n) for n in value.reshape(-1)]


def is_tensor(value: ir.Value) -> bool:
    """Whether a value is a tensor, as far as the model says, and no sequence or option of some."""
    return not isinstance(value.type, (ir.SequenceType, ir.OptionalType))


def dtype_name(value: ir.Value | None) -> str:
    """The name of a tensor's dtype; empty where the model does not say, and of a sequence."""
    dtype = None if value is None or not is_tensor(value) else value.dtype
    if dtype is None and value is not None and value.const_value is not None:
        dtype = value.const_value.dtype
    return "" if dtype is None else tensor_dtype(dtype)


def tensor_dtype(dtype: ir.DataType) -> str:
    """The name of a dtype as numpy has it, or ONNX's own where numpy has none."""
    try:
        return str(dtype.numpy().name)
    except (TypeError, KeyError):
        return dtype.name.lower()
