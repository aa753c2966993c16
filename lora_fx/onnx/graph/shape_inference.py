"""Inference of the shapes that an ONNX file does not give."""

from __future__ import annotations

import logging

import onnx_ir as ir

from lora_fx.errors import silenced
from lora_fx.onnx.graph.ops import OnnxOp, row_of
from lora_fx.onnx.graph.values import shape_of


def infer_shapes(model: ir.Model) -> bool:
    """Set the shapes that ONNX's inference finds; return whether all are known.

    Inference knows nothing of ops of codes: what lies behind them has the shape that it has in a
    copy of the model with floats in the place of these codes.
    """
    if not has_unknown_shapes(model):
        return True
    from onnx_ir.passes.common import ShapeInferencePass

    # where it cannot infer, it logs an error; a note says it to the user
    with silenced(levels={"onnx_ir": logging.CRITICAL}):
        ShapeInferencePass()(model)
        copy = _in_floats(model)
        if copy is not None:
            ShapeInferencePass()(copy)
            _copy_shapes(copy, model)
    return not has_unknown_shapes(model)


def has_unknown_shapes(model: ir.Model) -> bool:
    """Whether an op of the table has an operand of unknown shape."""
    for node in model.graph.all_nodes():
        if row_of(node) is None:
            continue
        for value in (*node.inputs, node.outputs[0]):
            if value is not None and shape_of(value) is None and value.const_value is None:
                return True
    return False


def _in_floats(model: ir.Model) -> ir.Model | None:
    """Return a copy with floats instead of codes that ONNX's inference does not support.

    None where there are none.
    """
    copy = model.clone()
    replaceable = []
    for node in copy.graph.all_nodes():
        row = row_of(node)
        if node.domain and row is not None and row.twin:
            replaceable.append((node, row))
    for i, (node, row) in enumerate(replaceable):
        _replace_by_floats(copy, node, row, f"{i}_in_floats")
    if not replaceable:
        return None
    return copy


def _replace_by_floats(model: ir.Model, node: ir.Node, row: OnnxOp, name: str) -> None:
    """Replace a node by the float op with the same shapes; its weight is a new input."""
    shapes = [shape_of(value) for value in node.inputs]
    use = next(row.uses(node, shapes.__getitem__), None)
    scale = node.inputs[2]
    graph = node.graph
    if use is None or scale is None or graph is None:
        return

    shape = use.stored or shape_of(node.inputs[use.weight]) or ()
    if use.stored and row.twin == "MatMul":
        shape = shape[::-1]
    dtype = scale.dtype or ir.DataType.FLOAT
    weight = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    model.graph.inputs.append(weight)

    x = node.inputs[use.x]
    twins = []
    if row.twin == "MatMul":  # x may be codes too
        cast = ir.node("Cast", [x], {"to": int(dtype)})
        twins.append(cast)
        x = cast.outputs[0]
    operands = {use.x: x, use.weight: weight}
    twin = ir.node(row.twin, [operands[0], operands[1]])
    twins.append(twin)
    twin.outputs[0].name = node.outputs[0].name
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], twins, node.outputs[:1], twin.outputs
    )


def _copy_shapes(source: ir.Model, model: ir.Model) -> None:
    """Copy shapes and dtypes from another model's values of the same names."""
    source_values = {}
    for node in source.graph.all_nodes():
        for value in node.outputs:
            source_values[value.name] = value
    for node in model.graph.all_nodes():
        for value in node.outputs:
            source_value = source_values.get(value.name)
            if value.shape is None and source_value is not None and source_value.shape is not None:
                value.shape = source_value.shape
                value.type = value.type or source_value.type
