"""The uses of weights in a graph, from the op table and the data flow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import fx

from lora_fx.fx.graph import ops
from lora_fx.fx.graph.agreeing_roles import agreeing_roles
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
"""The functions that higher-order ops call, by the name that the graph reads."""


FxUse = tuple[Site, fx.Node, FxWeight]
"""One use of a weight: the site, its node, and the weight as the flow has it."""


def uses(graph: fx.Graph, flow: FxFlow, bodies: Bodies) -> Iterator[FxUse]:
    """Yield every use in execution order, without marked nodes, which belong to branches."""
    namer = Namer()
    for node in graph.nodes:
        if node.op != "call_function" or is_marked(node):
            continue
        row = ops.row_of(node)
        if row is not None and node in flow.behind:
            continue  # a constant times a parameter: a computed weight, read later on
        for use, weight in _weight_operands(node, row, flow, bodies):
            site = _site(node, use, weight, row, namer)
            if row is not None:
                site = replace(site, roles=_roles(node, site, flow))
            yield site, node, weight


def _weight_operands(
    node: fx.Node, row: ops.FxOp | None, flow: FxFlow, bodies: Bodies
) -> list[tuple[ops.FxOperand, FxWeight]]:
    """Return the weight operands of a node; one of them if the op takes one weight only."""
    if row is None:
        possible = body_uses(node, flow.weights, bodies)
    else:
        possible = row.uses(node)
    operands = []
    for use in possible:
        weight = flow.weights.get(ops.pick(node, use.weight))
        if weight is not None:
            operands.append((use, weight))

    if row is None or row.many or len(operands) < 2:
        return operands
    parameters = [(use, weight) for use, weight in operands if weight.name]
    if len(parameters) == 1:
        return parameters
    use, weight = operands[0]  # of two weights neither is an activation
    return [(use, replace(weight, edited=f"{op_name(node)} with another weight"))]


def _site(
    node: fx.Node, use: ops.FxOperand, weight: FxWeight, row: ops.FxOp | None, namer: Namer
) -> Site:
    scope, module_class = scope_of(node)
    refusal = use.refusal
    if weight.edited:
        refusal = f"the weight is computed by {weight.edited} from {', '.join(weight.behind)}"
    site_id = node.name
    if row is None or row.many:
        site_id += ":" + ".".join(map(str, use.weight))
    operand = shape_of(ops.pick(node, use.weight)) or ()
    axis = out_axis(use.kind)
    return Site(
        id=site_id,
        op=op_name(node) if row is None else row.op,
        kind=use.kind,
        parameter=namer(weight),
        view=weight.view,
        operand=tuple(hint(size) for size in operand),
        scope=scope,
        module_class=module_class,
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


def _roles(node: fx.Node, site: Site, flow: FxFlow) -> frozenset[str] | None:
    """Return the roles that the flow around a product agrees with."""
    if site.refusal and not site.allowed:
        return None
    inputs = [operand for operand in node.all_input_nodes if operand not in flow.weights]
    axes = site.kind.axes(site.operand)
    if axes.steps:  # a group of a convolution, whose axes are no longer the operand's
        return agreeing_roles(_result(node), inputs, widens=True, narrows=True)
    width = math.prod(site.operand[axis] for axis in axes.out)
    depth = math.prod(site.operand[axis] for axis in axes.in_)
    return agreeing_roles(_result(node), inputs, widens=width > depth, narrows=width < depth)


def _result(node: fx.Node) -> fx.Node:
    """Return the node that the rest of the graph reads: the site, or its sum with branches."""
    for user in node.users:
        if is_marked(user) and user.target is aten.add.Tensor and user.args[0] is node:
            return _result(user)
    return node


def body_uses(
    node: fx.Node, weights: Mapping[fx.Node, FxWeight], bodies_by_name: Bodies
) -> Iterator[ops.FxOperand]:
    """Yield the operands of a higher-order op that its bodies use as weights.

    The ops are cond, while_loop, map. The parameter is an operand of the op, and the body says what
    it is for. An update goes to the operand, W + s·b·a, so the body does not change.
    """
    bodies, paths = body_operands(node, bodies_by_name)
    for position, path in enumerate(paths):
        operand = ops.pick(node, path)
        if not isinstance(operand, fx.Node) or operand not in weights:
            continue
        axes: list[Axes] = []
        flops = 0
        for body in bodies:
            for axes_of_use, flops_of_use in _uses_inside(body, position, len(paths), operand):
                axes.append(axes_of_use)
                flops += flops_of_use
        if axes:
            yield ops.FxOperand(path, (0,), WeightForm("body", axes[0]), flops=flops)


def body_operands(
    node: fx.Node, bodies_by_name: Bodies
) -> tuple[list[fx.GraphModule], list[ops.Path]]:
    """Return the bodies of a higher-order op, and the paths to their placeholders' operands."""
    if not isinstance(node.target, HigherOrderOperator):
        return [], []
    bodies: list[fx.GraphModule] = []
    first_operand = 0
    for position, arg in enumerate(node.args):
        if isinstance(arg, fx.Node) and arg.op == "get_attr" and str(arg.target) in bodies_by_name:
            bodies.append(bodies_by_name[str(arg.target)])
            first_operand = position + 1

    paths: list[ops.Path] = []
    for position, arg in enumerate(node.args[first_operand:], first_operand):
        if isinstance(arg, (tuple, list)):
            paths += [(position, index) for index in range(len(arg))]
        else:
            paths.append((position,))
    return bodies, paths


def _uses_inside(
    body: fx.GraphModule, position: int, count: int, operand: fx.Node
) -> Iterator[tuple[Axes, int]]:
    """Yield the axes, in the operand, and the FLOPs of each use of a body's placeholder."""
    placeholders = body.graph.find_nodes(op="placeholder")
    if len(placeholders) != count or shape_of(placeholders[position]) != shape_of(operand):
        return
    placeholder = placeholders[position]
    shape = tuple(hint(size) for size in shape_of(operand) or ())
    weight = FxWeight("w", View(), shape, placeholder, ("w",))
    flow = weight_flow(body.graph, None, {}, {placeholder: weight})
    for site, _, _ in uses(body.graph, flow, bodies_in(body)):
        if not site.refusal:
            axes = site.kind.axes(site.operand)
            yield replace(axes, steps=site.view.steps + axes.steps), site.flops


def bodies_in(module: fx.GraphModule) -> dict[str, fx.GraphModule]:
    """Return the bodies of a graph module's higher-order ops, by the names that its graph reads."""
    children = module.named_children()
    return {name: child for name, child in children if isinstance(child, fx.GraphModule)}
