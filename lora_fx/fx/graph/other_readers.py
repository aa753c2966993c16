"""What reads a weight and is no site: an index, a norm, a sum, the model's output."""

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
from lora_fx.fx.graph.sites import Bodies, FxUse, body_operands, uses
from lora_fx.ir.graph import OtherReader


def other_readers(
    graph: fx.Graph, flow: FxFlow, found: Iterable[FxUse], bodies: Bodies
) -> list[OtherReader]:
    """Every read of a parameter, or of a view of it, that is neither a view nor a site."""
    taken = {(node, site.slot) for site, node, _ in found if not site.refusal or site.allowed}
    result, live = list[OtherReader](), set[fx.Node]()
    for node in reversed(graph.nodes):
        if node.op != "output" and not (node.is_impure() or any(u in live for u in node.users)):
            continue
        live.add(node)
        here = flow.weights.get(node)
        for operand in node.all_input_nodes if not is_marked(node) else ():
            w = flow.weights.get(operand)
            if w is None or not w.name:
                continue
            if here is not None and here.name == w.name and node.args[0] is operand:
                continue  # a view
            op = "the output" if node.op == "output" else op_name(node)
            inner, paths = body_operands(node, bodies)
            for path in ops.slots(node, operand):
                if path in paths:
                    result += _in_bodies(inner, paths.index(path), w)
                elif (node, path) not in taken and path != (SHAPE_ONLY.get(op),):
                    result.append(OtherReader(w.name, op, w.view))
    return result[::-1]


def _in_bodies(bodies: Sequence[fx.GraphModule], i: int, w: FxWeight) -> Iterator[OtherReader]:
    """What reads a weight, the i-th operand of some bodies, beside the products in them."""
    for body in bodies:
        place = [n for n in body.graph.nodes if n.op == "placeholder"][i]
        flow = weight_flow(body.graph, None, {}, {place: replace(w, root=place)})
        inner = {n: m for n, m in body.named_children() if isinstance(m, fx.GraphModule)}
        yield from other_readers(body.graph, flow, uses(body.graph, flow, inner), inner)
