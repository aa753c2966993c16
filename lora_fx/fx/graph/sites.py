"""Every use of a weight in a graph: the op table met with the data flow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import fx

from lora_fx.fx.graph import ops
from lora_fx.fx.graph.computed_weights import Namer
from lora_fx.fx.graph.flops import site_flops
from lora_fx.fx.graph.flow import FxFlow, FxWeight, weight_flow
from lora_fx.fx.graph.nodes import (
    NO_GRAD,
    hint,
    is_marked,
    op_name,
    scope_of,
    shape_of,
)
from lora_fx.fx.graph.parts import out_axis, parts_of
from lora_fx.fx.operators import HigherOrderOperator
from lora_fx.ir.graph import Axes, Site
from lora_fx.ir.kinds import WeightForm
from lora_fx.ir.quantised import no_fold
from lora_fx.ir.view import View

aten = torch.ops.aten
Bodies = Mapping[str, fx.GraphModule]
"""What higher-order ops call, by the name that a graph reads."""


FxUse = tuple[Site, fx.Node, FxWeight]
"""One use of a weight: the site, its node, and the weight as the flow has it."""


def uses(graph: fx.Graph, flow: FxFlow, bodies: Bodies) -> Iterator[FxUse]:
    """Every use, in execution order. Marked nodes are left out: they belong to branches."""
    namer = Namer()
    for node in graph.nodes:
        if node.op != "call_function" or is_marked(node):
            continue
        row = ops.row_of(node)
        given = body_uses(node, flow.weights, bodies) if row is None else row.uses(node)
        found = [(u, w) for u in given if (w := flow.weights.get(ops.pick(node, u.weight)))]
        if row is not None and not row.many and len(found) > 1:
            own = [(use, weight) for use, weight in found if weight.name]
            use, weight = found[0]  # of two weights neither is an activation
            both = replace(weight, edited=f"{op_name(node)} with another weight")
            found = own if len(own) == 1 else [(use, both)]
        if node in flow.behind and row is not None:
            continue  # a constant times a parameter: a computed weight, read later on
        for use, weight in found:
            yield _site(node, use, weight, row, namer), node, weight


def _site(
    node: fx.Node, use: ops.FxOperand, weight: FxWeight, row: ops.FxOp | None, namer: Namer
) -> Site:
    scope, cls = scope_of(node)
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
        operand=tuple(hint(n) for n in shape_of(ops.pick(node, use.weight)) or ()),
        scope=scope,
        module_class=cls,
        flops=site_flops(node, use),
        refusal=refusal,
        allowed=use.allowed and refusal == use.refusal,
        no_fold=no_fold(weight.format) if weight.format else "",
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


def body_uses(
    node: fx.Node, weights: Mapping[fx.Node, FxWeight], held: Bodies
) -> Iterator[ops.FxOperand]:
    """Uses of a higher-order op's operands as weights, by what its bodies do with them.

    The ops are cond, while_loop, map. The parameter is an operand of the op, and the body says what
    it is for. An update goes to the operand, W + s·b·a, so the body does not change.
    """
    bodies, paths = body_operands(node, held)
    for path in paths:
        operand = ops.pick(node, path)
        if not isinstance(operand, fx.Node) or operand not in weights:
            continue
        inner = [u for b in bodies for u in _inside(b, paths.index(path), len(paths), operand)]
        if inner:
            form = WeightForm("body", inner[0][0])
            yield ops.FxOperand(path, (0,), form, flops=sum(f for _, f in inner))


def body_operands(node: fx.Node, held: Bodies) -> tuple[list[fx.GraphModule], list[ops.Path]]:
    """The bodies of a higher-order op, and the paths to what their placeholders stand for."""
    if not isinstance(node.target, HigherOrderOperator):
        return [], []
    reads = {i: a for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"}
    bodies = {i: held[str(a.target)] for i, a in reads.items() if str(a.target) in held}
    last = max(bodies, default=-1)
    paths: list[ops.Path] = []
    for i, arg in enumerate(node.args[last + 1 :], last + 1):
        if isinstance(arg, (tuple, list)):
            paths += [(i, j) for j in range(len(arg))]
        else:
            paths.append((i,))
    return list(bodies.values()), paths


def _inside(
    body: fx.GraphModule, i: int, count: int, operand: fx.Node
) -> Iterator[tuple[Axes, int]]:
    """The axes, in terms of the operand, and the FLOPs of each use of a body's placeholder."""
    places = [n for n in body.graph.nodes if n.op == "placeholder"]
    if len(places) != count or shape_of(places[i]) != shape_of(operand):
        return
    shape = tuple(hint(n) for n in shape_of(operand) or ())
    start = FxWeight("w", View(), shape, places[i], ("w",))
    inner = {n: m for n, m in body.named_children() if isinstance(m, fx.GraphModule)}
    flow = weight_flow(body.graph, None, {}, {places[i]: start})
    for site, _, _ in uses(body.graph, flow, inner):
        if not site.refusal:
            axes = site.kind.axes(site.operand)
            yield replace(axes, steps=site.view.steps + axes.steps), site.flops
