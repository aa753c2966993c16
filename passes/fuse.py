"""fuse: the end of a branch and the sum with its layer's result become one op.

y + t·(s·b)ᵀ        becomes        addmm(y, t, bᵀ, alpha=s)

on rows: leading axes are flattened before, and put back after. The result of the product is never
written apart from y, no scaled copy of b is made or kept, and in 16 bits the sum is rounded once.
With b = 0 it adds an exact zero as before. Left alone: a result of one axis, factors that are read
through a view, and branches of other forms.

In a train program in 32 bits it is a call, ending(y, t, b, s): the sum is made in the memory of y,
and ∂L/∂b is (tᵀ·g)ᵀ and not gᵀ·t. In 16 bits neither was faster, and b would be cast once more.

This pass is torch's own: it reads the nodes that the fx emitter writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.branch_nodes import maker, operands
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import shape_of, value
from lora_fx.fx.regions import traced
from lora_fx.passes.base import PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class Fuse:
    """Let one addmm do the last product of a branch, its scale and the sum.

    Attributes:
        into: Add into the memory of y, in a call that no other framework knows.
    """

    into: bool = False

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds no sum of that form."""
        modified = any([_fuse(node, self.into) for node in list(graph.graph.nodes)])
        if modified:
            graph.graph.eliminate_dead_code()
        return PassResult(graph, modified)


def _fuse(node: fx.Node, into: bool) -> bool:
    """Replace y + t·(s·b)ᵀ, with b in the dtype of x; False for any other node."""
    y, product = operands(node, aten.add.Tensor) or (None, None)
    t, turned = operands(product, aten.matmul.default) or (None, None)
    cast, perm = operands(turned, aten.permute.default) or (None, None)
    scaled, x = operands(cast, aten.type_as.default) or (None, None)
    b, s = operands(scaled, aten.mul.Scalar) or (None, None)
    if perm != [1, 0] or len(product.users) > 1 or not isinstance(b, fx.Node) or b.op != "get_attr":
        return False
    source, rank = (operands(x, aten.dropout.default) or [x])[0], len(shape_of(y) or ())
    if rank < 2 or value(source) is None or value(y).dtype != value(source).dtype:
        return False
    emit, left, right = maker(node, node), y, t
    if into and len(y.users) == 1 and value(y).dtype == torch.float32:
        new = emit(ending, (y, t, b, float(s)))
        new.meta["val"] = value(y)
        node.replace_all_uses_with(new)
        return True
    if rank > 2:
        left, right = (emit(aten.flatten.using_ints, (v, 0, -2)) for v in (y, t))
    b = emit(aten.type_as.default, (b, x))
    turned = emit(aten.permute.default, (b, [1, 0]))
    new = emit(aten.addmm.default, (left, right, turned), {"alpha": float(s)})
    if rank > 2:
        new = emit(aten.view_as.default, (new, y))
    new.meta["val"] = value(y)
    node.replace_all_uses_with(new)
    return True


def ending(y: torch.Tensor, t: torch.Tensor, b: torch.Tensor, s: float) -> torch.Tensor:
    """Y + t·(s·b)ᵀ, in the memory of y [..., out] where nothing else traces the sum."""
    if traced() or type(y) is not torch.Tensor:
        turned = b.type_as(y).t()
        rows = torch.addmm(y.flatten(0, -2), t.flatten(0, -2).type_as(y), turned, alpha=s)
        return rows.view_as(y)
    result: torch.Tensor = _Ending.apply(y, t, b, s)  # type: ignore[no-untyped-call]
    return result


class _Ending(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, t: torch.Tensor, b: torch.Tensor, s: float
    ) -> torch.Tensor:
        ctx.save_for_backward(t, b)
        ctx.s = s
        rows, turned = t.flatten(0, -2).type_as(y), b.type_as(y).t()
        total = y.flatten(0, -2).addmm_(rows, turned, alpha=s)
        # no view of y: what a Function gives as a view may not be written to
        result: torch.Tensor = aten._unsafe_view.default(total, y.shape)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        t, b = ctx.saved_tensors
        g, rows = grad.flatten(0, -2), t.flatten(0, -2).type_as(grad)
        dt = torch.mm(g, b.type_as(g)).mul_(ctx.s)
        # MKL takes up to twice as long for gᵀ·t
        db = torch.empty_like(b).copy_(torch.mm(rows.t(), g).t()).mul_(ctx.s)
        return grad, dt.view_as(t).type_as(t), db, None
