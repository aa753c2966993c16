"""Weights that only the body of a higher-order op multiplies by: cond, while_loop, map.

The parameter is an operand of the higher-order op, and the body says what it is for. An update
goes to the operand, W + s·b·a, so the body does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from lora_fx.fx import ops
from lora_fx.fx.flops import site_flops
from lora_fx.fx.flow import Weight, weight_flow
from lora_fx.fx.nodes import hint, shape_of
from lora_fx.ir.graph import Axes
from lora_fx.ir.kinds import WeightForm
from lora_fx.ir.view import View


def body_uses(
    node: fx.Node, weights: Mapping[fx.Node, Weight], held: Mapping[str, fx.GraphModule]
) -> Iterator[ops.Use]:
    """Uses of a higher-order op's operands as weights, by what its bodies do with them."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return
    bodies = [b for a in node.args if (b := _body(a, held)) is not None]
    last = max((i for i, a in enumerate(node.args) if _body(a, held) is not None), default=-1)
    paths: list[ops.Path] = []
    for i, arg in enumerate(node.args[last + 1 :], last + 1):
        if isinstance(arg, (tuple, list)):
            paths += [(i, j) for j in range(len(arg))]
        else:
            paths.append((i,))
    for path in paths:
        operand = ops.pick(node, path)
        if not isinstance(operand, fx.Node) or operand not in weights:
            continue
        inner = [u for b in bodies for u in _inside(b, paths.index(path), len(paths), operand)]
        if inner:
            flops = sum(f for _, f in inner)
            axes = inner[0][0]
            yield ops.Use(path, (0,), WeightForm("body", axes), flops=flops)


def _body(arg: Any, held: Mapping[str, fx.GraphModule]) -> fx.GraphModule | None:
    reads = isinstance(arg, fx.Node) and arg.op == "get_attr"
    return held.get(str(arg.target)) if reads else None


def _inside(
    body: fx.GraphModule, i: int, count: int, operand: fx.Node
) -> Iterator[tuple[Axes, int]]:
    """(axes in terms of the operand, FLOPs) of each use of a body's placeholder."""
    places = [n for n in body.graph.nodes if n.op == "placeholder"]
    if len(places) != count or shape_of(places[i]) != shape_of(operand):
        return
    shape = tuple(hint(n) for n in shape_of(operand) or ())
    start = Weight("w", View(), shape, places[i], ("w",))
    inner = {n: m for n, m in body.named_children() if isinstance(m, fx.GraphModule)}
    flow = weight_flow(body.graph, None, {}, {places[i]: start})
    for node in body.graph.nodes:
        row = ops.row_of(node)
        uses = body_uses(node, flow.weights, inner) if row is None else row.uses(node)
        for use in uses:
            w = flow.weights.get(ops.pick(node, use.weight))
            if w is None or use.refusal or w.edited:
                continue
            axes = use.kind.axes(tuple(hint(n) for n in shape_of(ops.pick(node, use.weight)) or ()))
            steps = w.view.steps + axes.steps
            yield Axes(axes.batch, axes.out, axes.in_, steps), site_flops(node, use)
