"""fuse: what several ops spell out, one op does: in a capture, and in the branches beside it.

    attention(q, k, v, mask)            mask[…, i, j] = (j ≤ i), or 0 there and −∞ elsewhere
        → attention(q, k, v, is_causal)
    attention(q, k, v, mask)            mask true everywhere    → attention(q, k, v)
    attention(q, rep(k), rep(v))        each head repeated n times → attention(q, k, v, enable_gqa)
    x/2·(1 + F(r(x)))                   F = erf, r = x/√2, or F = tanh …  → gelu(x)
    dropout(x, 0), a slice that is all of x → x

Each is found in the graph (lora_fx.fx.graph.patterns): a mask by what it lets through at small
sizes and at such as are beyond all numbers in it, repeated heads by shapes, GELU by the numbers
that the chain makes. A mask that depends on an input, is changed in place, or is made by other ops,
stays. Torch's definition of is_causal is j ≤ i, from the upper left corner. GELU's gradient is that
of the chain; in 16 bits one op rounds once where the chain rounds at every step.

tᵢ = x·aᵢᵀ for i = 1 … n        becomes        (t₁ … tₙ) = split(x·[a₁; …; aₙ]ᵀ)

q, k and v of an attention, gate and up of an MLP: x is read once where it was read n times, and
products of a few columns are slow ones. Backward has one product for all ∂L/∂aᵢ, and one for their
part of ∂L/∂x. The a's stay tensors of their own. Left alone: a branch with a dropout of its own,
whose input is another value or is written to in between, factors that are read through a view, and
branches of different blocks, since the tensors of a block may be gathered for its own forward only.

y + t·(s·b)ᵀ        becomes        addmm(y, t, bᵀ, alpha=s)

on rows: leading axes are flattened before, and put back after. The result of the product is never
written apart from y, no scaled copy of b is made or kept, and in 16 bits the sum is rounded once.
With b = 0 it adds an exact zero as before. Left alone: a result of one axis, factors that are read
through a view, and branches of other forms.

In a train program in 32 bits it is a call, ending(y, t, b, s): the sum is made in the memory of y,
and ∂L/∂b is (tᵀ·g)ᵀ and not gᵀ·t. In 16 bits neither was faster, and b would be cast once more.

These passes are torch's own: the ops are ATen's, and branches the nodes that the fx emitter writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from operator import getitem
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.flow import Writes, written
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import argument, block_of, shape_of, value
from lora_fx.fx.graph.patterns import (
    ATTENTION,
    Projection,
    gelu_of,
    is_whole,
    maker,
    mask_form,
    operands,
    plain_mask,
    projections,
    shared_heads,
)
from lora_fx.fx.tensors import parameter_of
from lora_fx.passes.base import PassResult
from lora_fx.passes.recompute import traced

aten = torch.ops.aten


@dataclass(frozen=True)
class Clean:
    """Fold masks, repeated heads, GELUs and steps that do nothing."""

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds nothing to fold."""
        changed = written(graph.graph)
        form_of = cache(partial(mask_form, written=changed))
        modified = False
        for node in list(graph.graph.nodes):
            if node.target is ATTENTION:
                modified |= plain_mask(node, form_of)
                modified |= shared_heads(node)
            elif _does_nothing(node) and node not in changed:
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
                modified = True
            elif (found := gelu_of(node, changed)) is not None:
                _one_gelu(graph.graph, node, *found)
                modified = True
        if modified:
            graph.graph.eliminate_dead_code()
        return PassResult(graph, modified)


def _does_nothing(node: fx.Node) -> bool:
    if node.target is aten.dropout.default:
        return argument(node, "p") == 0.0 or not argument(node, "train")
    return is_whole(node)


def _one_gelu(graph: fx.Graph, node: fx.Node, x: fx.Node, approximate: str) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(aten.gelu.default, (x,), {"approximate": approximate})
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


@dataclass(frozen=True)
class Share:
    """Join the first products of branches.

    Attributes:
        blocks: Paths of modules that will be functions of their own; products stay in one.
        free: Read the ranks from the a's at every call, since others may take their place.
    """

    blocks: Sequence[str] = ()
    free: bool = False

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds one product for each value."""
        groups: dict[tuple[fx.Node, str], list[list[Projection]]] = {}
        writes = Writes(graph.graph)
        for p in projections(graph.graph):
            held = groups.setdefault((p.x, block_of(p.node, self.blocks)), [])
            if not held or writes.between(p.x, held[-1][0].node, p.node):
                held.append([])  # the value is another one from here on
            held[-1].append(p)
        several = [g for held in groups.values() for g in held if len(g) > 1]
        for group in several:
            _join(graph, group, self.free)
        if several:
            graph.graph.eliminate_dead_code()
        return PassResult(graph, bool(several))


def _join(graph: FxGraph, group: Sequence[Projection], free: bool) -> None:
    first = group[0]
    emit = maker(first.node, first.node)
    factors = [a for p in group for a in p.factors]
    held = [emit(str(f.target)) for f in factors]
    ranks: list[int] | list[fx.Node]
    ranks = [sum(len(parameter_of(graph.root, str(a.target))) for a in p.factors) for p in group]
    if free and len(held) == len(group):
        ranks = [emit(aten.sym_size.int, (a, 0)) for a in held]
    a = emit(aten.cat.default, (held,))
    cast = emit(aten.type_as.default, (a, first.x))
    turned = emit(aten.permute.default, (cast, [1, 0]))
    t = emit(aten.matmul.default, (first.x, turned))
    parts = emit(aten.split_with_sizes.default, (t, ranks, -1))
    for i, p in enumerate(group):
        p.node.replace_all_uses_with(emit(getitem, (parts, i)))


@dataclass(frozen=True)
class Fuse:
    """Let one addmm do the last product of a branch, its scale and the sum.

    Attributes:
        into: Add into the memory of y, in a call that no other framework knows.
    """

    into: bool = False

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds no sum of that form."""
        modified = False
        for node in list(graph.graph.nodes):
            modified |= _fuse(node, self.into)
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
