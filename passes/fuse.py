"""fuse: the end of a branch and the sum with its layer are one op.

y + t·(s·b)ᵀ        becomes        addmm(y, t, bᵀ, alpha=s)

on rows: leading axes are flattened before, and put back after. The result of the product is never
written apart from y, no scaled copy of b is made or kept, and in 16 bits the sum is rounded once.
With b = 0 it adds an exact zero as before. Left alone: a result of one axis, factors that are read
through a view, and branches of other forms.

This pass is torch's own: addmm with a scale is ATen's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import shape_of, value
from lora_fx.fx.graph.patterns import maker, operands
from lora_fx.passes.base import PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class Fuse:
    """Let one addmm do the last product of a branch, its scale and the sum."""

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds no sum of that form."""
        modified = False
        for node in list(graph.graph.nodes):
            end = _end_of(node)
            if end is not None:
                _fuse(node, end)
                modified = True
        if modified:
            graph.graph.eliminate_dead_code()
        return PassResult(graph, modified)


@dataclass(frozen=True)
class _End:
    """y + t·(s·b)ᵀ, with b in the dtype of x."""

    y: fx.Node
    t: fx.Node
    b: fx.Node
    x: fx.Node
    s: float


def _end_of(node: fx.Node) -> _End | None:
    y, product = operands(node, aten.add.Tensor) or (None, None)
    t, turned = operands(product, aten.matmul.default) or (None, None)
    cast, perm = operands(turned, aten.permute.default) or (None, None)
    scaled, x = operands(cast, aten.type_as.default) or (None, None)
    b, s = operands(scaled, aten.mul.Scalar) or (None, None)
    if perm != [1, 0] or len(product.users) > 1 or not isinstance(b, fx.Node) or b.op != "get_attr":
        return None
    source = (operands(x, aten.dropout.default) or [x])[0]
    if len(shape_of(y) or ()) < 2 or value(source) is None or value(y).dtype != value(source).dtype:
        return None
    return _End(y, t, b, x, float(s))


def _fuse(node: fx.Node, end: _End) -> None:
    emit, y, t = maker(node, node), end.y, end.t
    deep = len(shape_of(y) or ()) > 2
    if deep:
        y, t = (emit(aten.flatten.using_ints, (v, 0, -2)) for v in (y, t))
    b = emit(aten.type_as.default, (end.b, end.x))
    turned = emit(aten.permute.default, (b, [1, 0]))
    new = emit(aten.addmm.default, (y, t, turned), {"alpha": end.s})
    if deep:
        new = emit(aten.view_as.default, (new, end.y))
    new.meta["val"] = value(end.y)
    node.replace_all_uses_with(new)
