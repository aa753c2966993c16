"""recompute: the norm or the activation that feeds branches runs again in backward.

x = f(v), tᵢ = x·aᵢᵀ        becomes        (x, t₁ …) = recomputed(a₁ …; v)

with the same numbers, in forward and in backward. Autograd kept x for ∂L/∂aᵢ, and what the steps of
f keep; the region keeps v only, and a frozen layer that reads x keeps nothing of it. What f is, and
whether keeping v is less, is read from the graph: see lora_fx.fx.patterns.elementwise. Left alone:
values that are no such chain, whose chain keeps as little already (a ReLU), that an op changes in
place, whose branch has a dropout of its own, and branches in another block than their input.

This pass is torch's own: what is kept for backward is no property of other IRs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.flow import written
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.module.codegen import function
from lora_fx.fx.patterns.elementwise import (
    Chain,
    Maker,
    Projection,
    block_of,
    chain_of,
    differentiable_nodes,
    projections,
)
from lora_fx.fx.patterns.recompute import Code, region
from lora_fx.passes.base import PassResult


@dataclass(frozen=True)
class Recompute:
    """Let regions keep their inputs only.

    Attributes:
        blocks: Paths of modules that will be functions of their own; a region stays in one.
    """

    blocks: Sequence[str] = ()

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds the regions made and leaves them alone."""
        groups: dict[tuple[fx.Node, str], list[Projection]] = {}
        for p in projections(graph.graph):
            groups.setdefault((p.x, block_of(p.node, self.blocks)), []).append(p)
        flows = differentiable_nodes(graph.graph, graph.root) if groups else {}
        changed, modified = written(graph.graph), False
        for (x, block), group in groups.items():
            if x not in flows:
                continue  # another region makes it
            if block_of(x, self.blocks) != block:
                continue  # a block's tensors may be gathered for its own forward only
            chain = chain_of(x, flows, changed)
            if chain is not None:
                modified |= _replace(x, chain, group, flows)
        return PassResult(graph, modified)


def _replace(
    x: fx.Node, chain: Chain, group: Sequence[Projection], flows: dict[fx.Node, bool]
) -> bool:
    """Let one call make x and the products of its branches; `flows` follows what is there."""
    inside = set(chain.steps)
    outer = {n: [u for u in n.users if u not in inside] for n in chain.steps if n is not x}
    if any(u < x for users in outer.values() for u in users):
        return False  # read before x is made: the call would come too late
    made = [x, *(n for n, users in outer.items() if users)]
    emit = Maker(x, group[0].node)
    factors = [tuple(emit.get_attr(str(a.target)) for a in p.factors) for p in group]
    call = emit.call(region(_code(chain, made)), (factors, *chain.given))
    flows[call] = True
    idle = [*(n for p in group for n in _reads(p)), *chain.steps]
    for i, old in enumerate([*made, *(p.node for p in group)]):
        new = emit.call(getitem, (call, i))
        if "val" in old.meta:
            new.meta["val"] = old.meta["val"]
        flows[new] = flows.get(old, True)
        old.replace_all_uses_with(new)
    for node in reversed(idle):
        if not node.users:
            node.graph.erase_node(node)
            flows.pop(node, None)
    return True


def _reads(p: Projection) -> list[fx.Node]:
    """A product and what was made for it alone, inputs first."""
    nodes: list[fx.Node] = [p.node]
    while nodes[-1].op != "get_attr":
        nodes.append(next(i for i in reversed(nodes[-1].all_input_nodes) if i is not p.x))
    return [*p.factors, *reversed(nodes[:-1])]


def _code(chain: Chain, made: Sequence[fx.Node]) -> Code:
    """The steps of a chain as one function of what they read."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in chain.given:
        env[node] = graph.placeholder(node.name)
    for node in chain.steps:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in made))
    run = function(graph, f"recomputed {made[0].name}")

    def code(*values: Any) -> tuple[torch.Tensor, ...]:
        result: tuple[torch.Tensor, ...] = run(None, *values)
        return result

    return code
