"""Gemm(Reshape(x, [-1, k]), W, b) → MatMul(x, W) + b, with x in its shape before flattening.

The exporter writes GPT-2's Conv1D as Reshape, Gemm, Reshape; fusions look for MatMul and Add on
[batch, length, k]. Dimensions may be symbols. Gemms of flat matrices are left alone: the runtime
has a kernel for them. Rows keep their order, so what reshapes the product may go on doing so; a
reshape to the shape that the product has now goes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.emitter import add_initialiser
from lora_fx.onnx.graph.new_names import NewNames
from lora_fx.onnx.graph.values import constant, made_by, numbers, operand


@dataclass(frozen=True)
class GemmToMatMul(ir.passes.InPlacePass):
    """A rewrite of Gemms with alpha = beta = 1 whose activations were flattened."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        gemms = [node for node in model.graph if node.op_type == "Gemm" and not node.domain]
        names: NewNames | None = None
        for gemm in gemms:
            flat_gemm = _flat_gemm(gemm)
            if flat_gemm is not None:
                names = names or NewNames(model)
                _replace(model.graph, flat_gemm, names)
        return ir.passes.PassResult(model, names is not None)


@dataclass(frozen=True)
class _FlatGemm:
    """A Gemm of a flattened activation, and the parts of its replacement.

    Attributes:
        gemm: The node.
        source: The activation before it was flattened.
        lead: The dimensions of the source before the last one of the product's operand.
        width: The size of that last one.
        joins_heads: The source ends in [heads, width of a head], and not in the width.
        weight: The second operand.
        bias: The third one, where it has one.
        product: The result.
        readers: The nodes that read it, Reshapes all.
    """

    gemm: ir.Node
    source: ir.Value
    lead: Sequence[int | ir.SymbolicDim]
    width: int
    joins_heads: bool
    weight: ir.Value
    bias: ir.Value | None
    product: ir.Value
    readers: Sequence[ir.Node]


def _flat_gemm(gemm: ir.Node) -> _FlatGemm | None:
    """Return the parts of a Gemm that can become a MatMul; None for other Gemms.

    1. alpha and beta are 1, and x is read as it is, not transposed.
    2. x is a Reshape to [-1, k] of an activation of three dimensions or more.
    3. The activation ends in k, or in heads and their width, whose product is k.
    4. The number of columns of the result is known.
    5. All that reads the result are Reshapes that keep the order of its rows.
    6. A bias is by columns: one by rows has no place in three dimensions.
    """
    x = gemm.inputs[0]
    weight = gemm.inputs[1]
    flatten = made_by(x, "Reshape")
    if flatten is None or weight is None or not _is_plain(gemm):
        return None

    source = flatten.inputs[0]
    flat_shape = numbers(flatten, "shape", 1)
    if source is None or source.shape is None or flat_shape is None:
        return None
    if len(flat_shape) != 2 or flat_shape[0] != -1 or flat_shape[1] < 1:
        return None
    if len(source.shape) < 3:
        return None

    width = flat_shape[1]
    joins_heads = source.shape[-1] != width
    if joins_heads and not _ends_in_heads(source.shape, width):
        return None

    product = gemm.outputs[0]
    if product.shape is None or not isinstance(product.shape[-1], int):
        return None

    readers = [use.node for use in product.uses()]
    if not readers or product.is_graph_output():
        return None
    if not all(_keeps_order(reader, product) for reader in readers):
        return None

    bias = operand(gemm, 2)
    if bias is not None and (bias.shape is None or len(bias.shape) > 1):
        return None

    lead = source.shape[:2] if joins_heads else source.shape[:-1]
    return _FlatGemm(gemm, source, lead, width, joins_heads, weight, bias, product, readers)


def _is_plain(gemm: ir.Node) -> bool:
    """Whether a Gemm has no scales and reads its first operand untransposed."""
    attributes = gemm.attributes
    if attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0:
        return False
    return not attributes.get_int("transA", 0)


def _ends_in_heads(shape: ir.Shape, width: int) -> bool:
    """Whether a shape is [b, s, heads, head width] with heads · head width = `width`."""
    if len(shape) != 4:
        return False
    heads, head_width = shape[2:]
    if not isinstance(heads, int) or not isinstance(head_width, int):
        return False
    return heads * head_width == width


def _keeps_order(node: ir.Node, value: ir.Value) -> bool:
    """Whether this is a Reshape of the value that copies no dimension (no 0 in its target)."""
    if node.op_type != "Reshape" or node.domain or node.inputs[0] is not value:
        return False
    if node.attributes.get_int("allowzero", 0):
        return True
    target = constant(node.inputs[1])
    return target is not None and bool((target != 0).all())


def _replace(graph: ir.Graph, flat: _FlatGemm, names: NewNames) -> None:
    """Replace the Gemm by a MatMul, and an Add of the bias."""
    product = flat.product
    assert product.shape is not None
    shape = ir.Shape([*flat.lead, product.shape[-1]])
    nodes: list[ir.Node] = []

    x = flat.source
    if flat.joins_heads:
        sizes = np.array([0, 0, flat.width], np.int64)
        target = add_initialiser(graph, names.take(f"{product.name}_rows"), sizes)
        rows_shape = ir.Shape([*flat.lead, flat.width])
        nodes.append(_node("Reshape", (x, target), product, rows_shape, names))
        x = nodes[-1].outputs[0]

    weight = flat.weight
    if flat.gemm.attributes.get_int("transB", 0):
        nodes.append(_node("Transpose", (weight,), product, None, names, perm=[1, 0]))
        weight = nodes[-1].outputs[0]

    nodes.append(_node("MatMul", (x, weight), product, shape, names))
    if flat.bias is not None:
        nodes.append(_node("Add", (nodes[-1].outputs[0], flat.bias), product, shape, names))
    y = nodes[-1].outputs[0]

    flat.gemm.prepend(nodes)
    for reader in flat.readers:
        _read_instead(graph, reader, y)
    graph.remove(flat.gemm, safe=True)


def _node(
    op_type: str,
    inputs: Sequence[ir.Value],
    product: ir.Value,
    shape: ir.Shape | None,
    names: NewNames,
    **attributes: list[int],
) -> ir.Node:
    """Return a node for a product, named after it."""
    node = ir.node(op_type, inputs, attributes, name=names.take(f"{product.name}_{op_type}"))
    value = node.outputs[0]
    value.name = node.name
    value.type = product.type
    value.shape = shape
    return node


def _read_instead(graph: ir.Graph, reshape: ir.Node, y: ir.Value) -> None:
    """Let a Reshape read y, or replace it by y if y already has its result's shape."""
    reshaped = reshape.outputs[0]
    same_shape = reshaped.shape is not None and reshaped.shape == y.shape
    if same_shape and not reshaped.is_graph_output():
        reshaped.replace_all_uses_with(y)
        graph.remove(reshape, safe=True)
    else:
        reshape.replace_input_with(0, y)
