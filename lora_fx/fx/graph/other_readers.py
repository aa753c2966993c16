"""Find the readers of a weight that are not sites: an index, a norm, a sum, the model's output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import fx

from lora_fx.fx.graph import ops
from lora_fx.fx.graph.flow import SHAPE_ONLY, FxFlow, FxWeight, weight_flow
from lora_fx.fx.graph.nodes import (
    is_marked,
    op_name,
)
from lora_fx.fx.graph.sites import Bodies, FxUse, bodies_in, body_operands, uses
from lora_fx.ir.graph import OtherReader


def other_readers(
    graph: fx.Graph, flow: FxFlow, weight_uses: Iterable[FxUse], bodies: Bodies
) -> list[OtherReader]:
    """Every read of a parameter, or of a view of it, that is neither a view nor a site.

    Nodes on which no output and no side effect depends read nothing.
    """
    site_slots = {
        (node, site.slot) for site, node, _ in weight_uses if not site.refusal or site.allowed
    }
    readers: list[OtherReader] = []
    live = set[fx.Node]()
    for node in reversed(graph.nodes):
        is_used = any(user in live for user in node.users)
        if node.op != "output" and not is_used and not node.is_impure():
            continue
        live.add(node)
        if is_marked(node):
            continue
        for operand in node.all_input_nodes:
            weight = flow.weights.get(operand)
            if weight is None or not weight.name or _only_views(node, operand, weight, flow):
                continue
            op = "the output" if node.op == "output" else op_name(node)
            bodies_of_op, paths = body_operands(node, bodies)
            for path in ops.slots(node, operand):
                if path in paths:
                    readers += _in_bodies(bodies_of_op, paths.index(path), weight)
                elif (node, path) not in site_slots and path != (SHAPE_ONLY.get(op),):
                    readers.append(OtherReader(weight.name, op, weight.view))
    return readers[::-1]


def _only_views(node: fx.Node, operand: fx.Node, weight: FxWeight, flow: FxFlow) -> bool:
    """Whether a node's result is the operand's weight again, seen through a view."""
    result = flow.weights.get(node)
    return result is not None and result.name == weight.name and node.args[0] is operand


def _in_bodies(
    bodies: Sequence[fx.GraphModule], position: int, weight: FxWeight
) -> Iterator[OtherReader]:
    """The readers of a weight that is an operand of bodies, other than the products in them.

    Args:
        bodies: What a higher-order op calls.
        position: Which of the bodies' placeholders stands for the weight.
        weight: The operand, as the graph around them has it.
    """
    for body in bodies:
        placeholder = body.graph.find_nodes(op="placeholder")[position]
        flow = weight_flow(body.graph, None, {}, {placeholder: replace(weight, root=placeholder)})
        inner_bodies = bodies_in(body)
        weight_uses = uses(body.graph, flow, inner_bodies)
        yield from other_readers(body.graph, flow, weight_uses, inner_bodies)
