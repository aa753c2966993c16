"""FLOPs of a node at the example's sizes, as torch's own counter has them; recurrent by formula."""

from __future__ import annotations

import torch
from torch import fx

from lora_fx.fx.nodes import hint, numel, op_name, shape_of
from lora_fx.fx.ops import Use, pick
from lora_fx.ir.kinds import letters

aten = torch.ops.aten


def site_flops(node: fx.Node, use: Use) -> int:
    """2 · output elements · in; a recurrent weight runs once per step and row; lookups are free."""
    if use.flops is not None:
        return use.flops
    if use.kind.name == "embedding":
        return 0
    w = shape_of(pick(node, use.weight)) or ()
    if use.kind.name == "recurrent":
        x = shape_of(pick(node, use.x)) or ()
        return 2 * numel(w) * numel(x[:-1])
    if use.kind.name == "conv_transpose":
        return 2 * numel(shape_of(pick(node, use.x)) or ()) * numel(w[1:])
    y = shape_of(node)
    if y is None:
        return 0
    axes = use.kind.axes(tuple(hint(n) for n in w))
    split = axes.steps[0].shape if axes.steps else w  # type: ignore[union-attr]
    if use.refusal and len(split) < 2:
        return 2 * numel(y)  # a vector: every element once
    return 2 * numel(y) * numel(tuple(split[i] for i in axes.in_ if i < len(split)))


def data_flops(node: fx.Node) -> int:
    """FLOPs of one product of activations; an einsum multiplies along every letter."""
    y = shape_of(node)
    if y is None:
        return 0
    if node.target is aten.scaled_dot_product_attention.default:
        q, k, v = (shape_of(a) or () for a in node.args[:3])
        return 2 * numel(q) * hint(k[-2]) + 2 * numel(q[:-1]) * numel(v[-2:])
    if node.target is aten.einsum.default:
        shapes = [shape_of(o) or () for o in node.args[1]]  # type: ignore[union-attr]
        terms = letters(str(node.args[0]).replace(" ", ""), [len(s) for s in shapes])
        pairs = (zip(t, s, strict=True) for t, s in zip(terms, shapes, strict=False))
        return 2 * numel(tuple({c: n for pair in pairs for c, n in pair}.values()))
    if op_name(node).startswith("conv"):
        return 2 * numel(y) * numel((shape_of(node.args[1]) or ())[1:])
    first = shape_of(node.args[1 if op_name(node) in ("addmm", "baddbmm") else 0])
    return 2 * numel(y) * hint(first[-1]) if first else 0
