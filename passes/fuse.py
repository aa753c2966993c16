"""fuse: join the last product of a branch and its sum with the layer's result into one op.

y + t·(s·b)ᵀ        becomes        addmm(y, t, bᵀ, alpha=s)

on rows: leading axes are flattened before, and put back after. The result of the product is never
written apart from y, no scaled copy of b is made or kept, and in 16 bits the sum is rounded once.
With b = 0 it adds an exact zero as before. Left alone: a result of one axis, factors that are read
through a view, and branches of other forms.

In a train program in 32 bits it is a call, ending(y, t, b, s): the sum is made in the memory of y,
and ∂L/∂b is (tᵀ·g)ᵀ and not gᵀ·t. In 16 bits neither was faster, and b would be cast once more.
A scale that is a tensor, as in a module compiled for many adapters, is multiplied into b before.

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
from lora_fx.fx.train_regions import traced
from lora_fx.passes.base import PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class Fuse:
    """Compute the last product of a branch, its scale and the sum in one addmm.

    Attributes:
        into: Add into the memory of y, in a call that no other framework knows.
    """

    into: bool = False

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds no sum of that form."""
        modified = False
        for node in list(graph.graph.nodes):
            end = _branch_end(node)
            if end is not None:
                _fuse(end, self.into)
                modified = True
        if modified:
            graph.graph.eliminate_dead_code()
        return PassResult(graph, modified)


@dataclass(frozen=True)
class _BranchEnd:
    """The nodes of y + t·(s·b)ᵀ, with b in the dtype of x.

    Attributes:
        sum: The sum.
        y: The result of the layer.
        t: What b multiplies, x·aᵀ.
        b: The get_attr of [out, rank].
        s: The scale, a number or a tensor.
        x: The input of the branch, whose dtype b takes.
    """

    sum: fx.Node
    y: fx.Node
    t: fx.Node
    b: fx.Node
    s: float | fx.Node
    x: fx.Node


def _branch_end(node: fx.Node) -> _BranchEnd | None:
    """Return the branch end whose sum is this node; None for any other node.

    1. The node is y + t·(type_as(b·s, x))ᵀ, in a branch's nodes without keywords.
    2. Nothing else reads the product, and b is a parameter itself.
    3. The result has rows: two axes or more.
    4. y has the dtype of x, before a dropout of the branch's own.
    """
    y, product = operands(node, aten.add.Tensor) or (None, None)
    t, transposed = operands(product, aten.matmul.default) or (None, None)
    cast, perm = operands(transposed, aten.permute.default) or (None, None)
    scaled, x = operands(cast, aten.type_as.default) or (None, None)
    by_number = operands(scaled, aten.mul.Scalar)
    b, s = by_number or operands(scaled, aten.mul.Tensor) or (None, None)
    if perm != [1, 0] or len(product.users) > 1:
        return None
    if not isinstance(b, fx.Node) or b.op != "get_attr":
        return None
    if len(shape_of(y) or ()) < 2:
        return None
    dropout = operands(x, aten.dropout.default)
    source = dropout[0] if dropout else x
    if value(source) is None or value(y).dtype != value(source).dtype:
        return None
    if not by_number and (not isinstance(s, fx.Node) or s.op != "get_attr"):
        return None
    return _BranchEnd(node, y, t, b, s, x)


def _fuse(end: _BranchEnd, into: bool) -> None:
    """Replace the sum by one op; it writes into y's memory if `into` and nothing else reads y."""
    emit = maker(end.sum, end.sum)
    y = end.y
    b = end.b
    s = end.s
    if isinstance(s, fx.Node):
        b = emit(aten.mul.Tensor, (b, s))
        s = 1.0
    if into and len(y.users) == 1 and value(y).dtype == torch.float32:
        fused = emit(ending, (y, end.t, b, s))
    else:
        has_leading_axes = len(shape_of(y) or ()) > 2
        rows_of_y = y
        rows_of_t = end.t
        if has_leading_axes:
            rows_of_y = emit(aten.flatten.using_ints, (y, 0, -2))
            rows_of_t = emit(aten.flatten.using_ints, (end.t, 0, -2))
        b = emit(aten.type_as.default, (b, end.x))
        transposed = emit(aten.permute.default, (b, [1, 0]))
        fused = emit(aten.addmm.default, (rows_of_y, rows_of_t, transposed), {"alpha": s})
        if has_leading_axes:
            fused = emit(aten.view_as.default, (fused, y))
    fused.meta["val"] = value(y)
    end.sum.replace_all_uses_with(fused)


def ending(y: torch.Tensor, t: torch.Tensor, b: torch.Tensor, s: float) -> torch.Tensor:
    """Return y + t·(s·b)ᵀ, written into the memory of y [..., out] unless the call is traced."""
    if traced() or type(y) is not torch.Tensor:
        # Inductor adds where the sum is read, and before an addmm it copies y. By rows, since
        # autograd then has tᵀ·g for bᵀ, and for a transposed one gᵀ·t (see _Ending).
        b_by_rows = (b * s).type_as(y).t().contiguous()
        return y + torch.matmul(t.type_as(y), b_by_rows)
    result: torch.Tensor = _Ending.apply(y, t, b, s)  # type: ignore[no-untyped-call]
    return result


class _Ending(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, t: torch.Tensor, b: torch.Tensor, s: float
    ) -> torch.Tensor:
        ctx.save_for_backward(t, b)
        ctx.s = s
        rows_of_t = t.flatten(0, -2).type_as(y)
        total = y.flatten(0, -2).addmm_(rows_of_t, b.type_as(y).t(), alpha=s)
        # no view of y: what a Function gives as a view may not be written to
        result: torch.Tensor = aten._unsafe_view.default(total, y.shape)
        return result

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        t, b = ctx.saved_tensors
        rows_of_dy = dy.flatten(0, -2)
        rows_of_t = t.flatten(0, -2).type_as(dy)
        dt = torch.mm(rows_of_dy, b.type_as(rows_of_dy)).mul_(ctx.s)
        # MKL takes up to twice as long for gᵀ·t
        db = torch.empty_like(b).copy_(torch.mm(rows_of_t.t(), rows_of_dy).t()).mul_(ctx.s)
        return dy, dt.view_as(t).type_as(t), db, None
