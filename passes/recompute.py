"""recompute: the norm or the activation that feeds branches runs again in backward.

x = f(v), tᵢ = x·aᵢᵀ        becomes        (x, t₁ …) = recomputed(a₁ …; v)

with the same numbers, in forward and in backward. Autograd kept x for ∂L/∂aᵢ, and what the steps of
f keep; the region keeps v only, and a frozen layer that reads x keeps nothing of it. What f is, and
whether keeping v is less, is read from the graph: see lora_fx.fx.graph.elementwise_chains. Left
alone: values that are no such chain, whose chain keeps as little already (a ReLU), that an op
changes in place, whose branch has a dropout of its own, and branches in another block than their
input.

This pass is torch's own: what is kept for backward is no property of other IRs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from lora_fx.fx.gelu_tanh import gelu_tanh
from lora_fx.fx.graph.branch_nodes import Projection, maker, projections
from lora_fx.fx.graph.elementwise_chains import VIEWS, Chain, chain_of, differentiable_nodes
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.in_place import Writes
from lora_fx.fx.graph.nodes import block_of, shape_of
from lora_fx.fx.regions import code_of, region
from lora_fx.passes.base import PassResult
from lora_fx.text import by_key

aten = torch.ops.aten


@dataclass(frozen=True)
class Recompute:
    """Let regions keep their inputs only.

    Attributes:
        blocks: Paths of modules that will be functions of their own; a region stays in one.
    """

    blocks: Sequence[str] = ()

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds the regions made and leaves them alone."""
        found = projections(graph.graph)
        groups = by_key(((p.x, block_of(p.node, self.blocks)), p) for p in found)
        flows = differentiable_nodes(graph.graph, graph.root) if groups else {}
        changed, modified = Writes(graph.graph).ever(), False
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
    emit = maker(x, group[0].node)
    factors = [tuple(emit(str(a.target)) for a in p.factors) for p in group]
    code = code_of(chain.reads, chain.steps, made, f"recomputed {x.name}")
    formula = gelu_tanh if made == [x] and _is_gelu_tanh(chain) else None
    call = emit(region(code, formula), (factors, *chain.reads))
    flows[call] = True
    idle = [*(n for p in group for n in _reads(p)), *chain.steps]
    for i, old in enumerate([*made, *(p.node for p in group)]):
        new = emit(getitem, (call, i))
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


def _is_gelu_tanh(chain: Chain) -> bool:
    """True where all that is done to the first value is GELU by its tanh formula."""
    done = [(n.target, n.kwargs) for n in chain.steps if n.target not in VIEWS]
    same = str(shape_of(chain.reads[0])) == str(shape_of(chain.steps[-1]))  # asks no symbol
    return same and done == [(aten.gelu.default, {"approximate": "tanh"})]
