"""y + (x A) B → Gemm(x A, B, y) on flat rows, where A and B are inputs of a switchable graph.

The sum is then made inside the product. As an Add of its own it reads and writes every activation
once more, which costs as much as the products of a small rank, and the same at rank 0. Where the
result and its bias are only reshaped, all of it stays flat: Gemm(x A, B, Gemm(x, W, bias)).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from lora_fx.onnx.flat_rows import FlatRows, keep_zeros, product_operands, reshaped_bias
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import made_by, rank, remove_unread
from lora_fx.onnx.manifest import SwitchSlot


@dataclass(frozen=True)
class BranchSum:
    """The values of a sum y + (x A) B."""

    x: ir.Value
    a: ir.Value
    b: ir.Value
    y: ir.Value


def accumulate(graph: OnnxGraph, slots: Iterable[SwitchSlot]) -> None:
    """Rewrite every branch of that form; branches with casts or stacks in them stay as they are."""
    flat = FlatRows(graph)
    slots_by_names = {(slot.a, slot.b): slot for slot in slots if not slot.batch}
    for node in list(graph.model.graph.all_nodes()):
        branch = _match(node)
        if branch is None:
            continue
        slot = slots_by_names.get((str(branch.a.name), str(branch.b.name)))
        if slot is not None and not _beside_codes(node, branch.x):
            _rewrite(node, branch, slot, flat)
    graph.changed()


def _match(node: ir.Node) -> BranchSum | None:
    """The values of Add(y, MatMul(MatMul(x, A), B)); None for other nodes."""
    if node.op_type != "Add" or node.domain:
        return None
    for y, delta in (node.inputs, node.inputs[::-1]):
        outer = product_operands(delta)
        inner = product_operands(outer[0]) if outer else None
        if outer is None or inner is None or y is None:
            continue
        x, a = inner
        if rank(y) and rank(y) == rank(x):
            return BranchSum(x, a, outer[1], y)
    return None


def _beside_codes(add: ir.Node, x: ir.Value) -> bool:
    """True if a Reshape would get codes of activations as its input.

    ONNX Runtime 1.31 moves QuantizeLinear over it, with a zero point of another dtype than the
    scale's own codes, and then refuses the graph.
    """
    readers = [use.node.op_type for use in add.outputs[0].uses()]
    return made_by(x, "DequantizeLinear") is not None or "QuantizeLinear" in readers


def _rewrite(add: ir.Node, branch: BranchSum, slot: SwitchSlot, flat: FlatRows) -> None:
    """Make one product of the sum, or of the sum and its bias."""
    total = add.outputs[0]
    if rank(branch.y) == 2:
        low = flat.emit(add, "MatMul", branch.x, branch.a)
        product = flat.emit(add, "Gemm", low, branch.b, branch.y)
        product.shape = total.shape
        _replace(total, product)
        return

    rows = flat.rows(add, branch.x, slot.inside)
    low = flat.emit(add, "MatMul", rows, branch.a)
    bias = reshaped_bias(add, branch.x, branch.y)
    if bias is not None:
        layer = flat.biased_layer(add, bias, branch.y, rows)
        _replace(bias.outputs[0], flat.emit(add, "Gemm", low, branch.b, layer))
        return
    y_rows = flat.rows(add, branch.y, slot.out)
    product = flat.emit(add, "Gemm", low, branch.b, y_rows)
    y_shape = flat.emit(add, "Shape", branch.y)
    product = flat.emit(add, "Reshape", product, y_shape, **keep_zeros(flat.graph))
    product.shape = total.shape
    _replace(total, product)


def _replace(total: ir.Value, product: ir.Value) -> None:
    """Let all readers of a sum read the product; an output of the graph keeps its name."""
    product.type = total.type
    total.replace_all_uses_with(product, replace_graph_outputs=True)
    if product.is_graph_output():
        unused_name = product.name
        product.name = total.name
        total.name = unused_name
    remove_unread(total.producer())
