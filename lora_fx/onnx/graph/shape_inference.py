"""Shapes of values that an ONNX file does not state."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.onnx.graph.ops import row_of
from lora_fx.onnx.graph.values import shape_of


def unknown_shapes(model: ir.Model) -> bool:
    """True when an op of the table has an operand of unknown shape."""
    nodes = (n for n in model.graph.all_nodes() if row_of(n) is not None)
    values = (v for n in nodes for v in (*n.inputs, n.outputs[0]) if v is not None)
    return any(shape_of(v) is None and v.const_value is None for v in values)


def in_floats(model: ir.Model) -> ir.Model | None:
    """The model with floats in the place of codes that ONNX's inference knows nothing of.

    None where there are none.
    """
    whole = model.clone()
    known = [(n, r) for n in whole.graph.all_nodes() if n.domain and (r := row_of(n)) and r.twin]
    for i, (node, row) in enumerate(known):
        use = next(row.uses(node, [shape_of(v) for v in node.inputs].__getitem__), None)
        scale, graph = node.inputs[2], node.graph
        if use is None or scale is None or graph is None:
            continue
        w = use.stored or shape_of(node.inputs[use.weight]) or ()
        w = w[::-1] if use.stored and row.twin == "MatMul" else w
        kind = ir.TensorType(scale.dtype or ir.DataType.FLOAT)
        floats = ir.Value(name=f"{i}_in_floats", shape=ir.Shape(w), type=kind)
        whole.graph.inputs.append(floats)
        x = node.inputs[use.x]
        new = [ir.node("Cast", [x], {"to": int(kind.dtype)})] if row.twin == "MatMul" else []
        operands = {use.x: new[0].outputs[0] if new else x, use.weight: floats}
        new.append(ir.node(row.twin, [operands[0], operands[1]]))
        made = new[-1].outputs
        made[0].name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs[:1], made)
    return whole if known else None


def copy_shapes(source: ir.Model, model: ir.Model) -> None:
    """Give values the shape and dtype that another model has for their names."""
    known = {v.name: v for n in source.graph.all_nodes() for v in n.outputs}
    for value in (v for n in model.graph.all_nodes() for v in n.outputs):
        other = known.get(value.name)
        if value.shape is None and other is not None and other.shape is not None:
            value.shape, value.type = other.shape, value.type or other.type
