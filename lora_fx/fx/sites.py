"""Every use of a weight in a graph: the op table met with the data flow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from lora_fx.fx import ops
from lora_fx.fx.bodies import body_uses
from lora_fx.fx.capture.trace import NO_GRAD
from lora_fx.fx.computed import Namer
from lora_fx.fx.emitter import is_marked
from lora_fx.fx.flops import site_flops
from lora_fx.fx.flow import Flow, Weight, scope_of
from lora_fx.fx.nodes import hint, op_name, shape_of
from lora_fx.fx.parts import out_axis, parts_of
from lora_fx.ir.graph import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class Found:
    """One use of a weight: the node, the table's row of its operand, and the weight."""

    node: fx.Node
    use: ops.Use
    weight: Weight


def uses(
    graph: fx.Graph, flow: Flow, bodies: Mapping[str, fx.GraphModule]
) -> Iterator[tuple[Site, Found]]:
    """(site, what it was found by), in execution order; marked nodes are left out."""
    namer = Namer()
    for node in graph.nodes:
        if node.op != "call_function" or is_marked(node):
            continue
        row = ops.row_of(node)
        given = body_uses(node, flow.weights, bodies) if row is None else row.uses(node)
        found = [
            Found(node, u, w)
            for u in given
            if (w := flow.weights.get(ops.pick(node, u.weight))) is not None
        ]
        if row is not None and not row.many and len(found) > 1:
            plain = [f for f in found if f.weight.name]
            found = plain if len(plain) == 1 else [_both(found[0])]
        if node in flow.behind and row is not None:
            continue  # a constant times a parameter: a computed weight, read later on
        for f in found:
            yield _site(f, row, namer), f


def _site(found: Found, row: ops.Row | None, namer: Namer) -> Site:
    node, use, weight = found.node, found.use, found.weight
    scope, cls = scope_of(node)
    operand = shape_of(ops.pick(node, use.weight)) or ()
    refusal = use.refusal
    if weight.edited:
        refusal = f"the weight is computed by {weight.edited} from {', '.join(weight.behind)}"
    many = row is None or row.many
    axis = out_axis(use.kind)
    return Site(
        id=f"{node.name}:{'.'.join(map(str, use.weight))}" if many else node.name,
        op=op_name(node) if row is None else row.op,
        kind=use.kind,
        parameter=namer(weight),
        view=weight.view,
        operand=tuple(hint(n) for n in operand),
        scope=scope,
        module_class=cls,
        flops=site_flops(node, use),
        refusal=refusal,
        allowed=use.allowed and refusal == use.refusal,
        no_grad=bool(node.meta.get(NO_GRAD)),
        gain=use.gain,
        behind=weight.behind,
        slot=use.weight,
        root=weight.root.name,
        parts=() if axis is None else parts_of(_result(node), axis),
        attrs=use.attrs,
    )


def _result(node: fx.Node) -> fx.Node:
    """What the rest of the graph reads: the node, or the sum with its branches."""
    for user in node.users:
        if is_marked(user) and user.target is aten.add.Tensor and user.args[0] is node:
            return _result(user)
    return node


def _both(found: Found) -> Found:
    """A product of two weights: neither operand is an activation."""
    weight = replace(found.weight, edited=f"{op_name(found.node)} with another weight")
    return replace(found, weight=weight)
