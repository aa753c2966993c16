"""Gemm(Reshape(x, [-1, k]), W, b) → MatMul(x, W) + b, with x as it was before it was flattened.

The exporter writes GPT-2's Conv1D as Reshape, Gemm, Reshape; fusions look for MatMul and Add on
[batch, length, k]. Dimensions may be symbols. Gemms of flat matrices are left alone: the runtime
has a kernel for them. Rows keep their order, so what reshapes the product may go on doing so; a
reshape to the shape that the product has now goes away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.flow import constant, made_by, numbers, operand
from lora_fx.onnx.graph.graph import add_initialiser


@dataclass(frozen=True)
class GemmToMatMul(ir.passes.InPlacePass):
    """Gemms with alpha = beta = 1 of flattened activations."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        gemms = [n for n in model.graph if n.op_type == "Gemm" and not n.domain]
        return ir.passes.PassResult(model, any([_rewrite(model, n) for n in gemms]))


def _rewrite(model: ir.Model, gemm: ir.Node) -> bool:
    x, w = gemm.inputs[0], gemm.inputs[1]
    flat = made_by(x, "Reshape")
    attributes = gemm.attributes
    scales = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    plain = scales == (1.0, 1.0) and not attributes.get_int("transA", 0)
    if x is None or flat is None or not plain:
        return False
    source, sizes = flat.inputs[0], numbers(flat, "shape", 1)
    if source is None or source.shape is None or sizes is None or w is None:
        return False
    shape = list(source.shape)
    if len(sizes) != 2 or sizes[0] != -1 or len(shape) < 3 or sizes[1] < 1:
        return False
    out, bias = gemm.outputs[0], operand(gemm, 2)
    if out.shape is None or not isinstance(out.shape[-1], int):
        return False
    uses = [u.node for u in out.uses()]
    if not uses or out.is_graph_output() or not all(_keeps_order(n, out) for n in uses):
        return False
    if bias is not None and (bias.shape is None or len(bias.shape) > 1):
        return False  # a bias by rows has no place in 3-d
    lead, width = shape[:-1], sizes[1]
    joined = shape[-1] != width  # heads and their width in one: [b, s, heads, width] → [b, s, k]
    if joined:
        lead, heads = shape[:2], [n for n in shape[2:] if isinstance(n, int)]
        if len(shape) != 4 or len(heads) != 2 or math.prod(heads) != width:
            return False
    new: list[ir.Node] = []

    def made(op: str, *inputs: ir.Value, sizes: ir.Shape | None, **given: list[int]) -> ir.Value:
        new.append(ir.node(op, inputs, given, name=f"{out.name}_{op}"))
        value = new[-1].outputs[0]  # NAME_1 would be torch's name of the next product
        value.name, value.type, value.shape = new[-1].name, out.type, sizes
        return value

    if joined:
        to = add_initialiser(model.graph, f"{out.name}_rows", np.array([0, 0, width], np.int64))
        source = made("Reshape", source, to, sizes=ir.Shape([*lead, width]))
    if attributes.get_int("transB", 0):
        w = made("Transpose", w, sizes=None, perm=[1, 0])
    full = ir.Shape([*lead, out.shape[-1]])
    y = made("MatMul", source, w, sizes=full)
    if bias is not None:
        y = made("Add", y, bias, sizes=full)
    gemm.prepend(new)
    for after in uses:
        kept = after.outputs[0]
        if kept.shape is not None and kept.shape == full and not kept.is_graph_output():
            kept.replace_all_uses_with(y)
            model.graph.remove(after, safe=True)
        else:
            after.replace_input_with(0, y)
    model.graph.remove(gemm, safe=True)
    return True


def _keeps_order(node: ir.Node, value: ir.Value) -> bool:
    """A Reshape of the value that copies no dimension from it (no 0 in its target)."""
    if node.op_type != "Reshape" or node.domain or node.inputs[0] is not value:
        return False
    if node.attributes.get_int("allowzero", 0):
        return True
    target = constant(node.inputs[1])
    return target is not None and bool((target != 0).all())
