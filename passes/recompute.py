"""recompute: compute the norm or activation that feeds branches again in the backward pass.

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

from torch import fx

from lora_fx.fx.graph.branch_nodes import Projection, maker, projections
from lora_fx.fx.graph.chain_formulas import formula_of
from lora_fx.fx.graph.elementwise_chains import Chain, chain_of, differentiable_nodes
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.in_place import Writes
from lora_fx.fx.graph.nodes import block_of
from lora_fx.fx.train_regions import code_of, region
from lora_fx.passes.base import PassResult
from lora_fx.text import by_key


@dataclass(frozen=True)
class Recompute:
    """Make regions that keep only their inputs for the backward pass.

    Attributes:
        blocks: Paths of modules that will be functions of their own; a region stays in one.
    """

    blocks: Sequence[str] = ()

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run changes nothing."""
        groups = by_key(
            ((projection.x, block_of(projection.node, self.blocks)), projection)
            for projection in projections(graph.graph)
        )
        flows = differentiable_nodes(graph.graph, graph.root) if groups else {}
        written = Writes(graph.graph).ever()
        modified = False
        for (x, block), group in groups.items():
            if x not in flows:
                continue  # another region makes it
            if block_of(x, self.blocks) != block:
                continue  # a block's tensors may be gathered for its own forward only
            chain = chain_of(x, flows, written)
            if chain is not None:
                modified |= _replace(x, chain, group, flows)
        return PassResult(graph, modified)


def _replace(
    x: fx.Node, chain: Chain, group: Sequence[Projection], flows: dict[fx.Node, bool]
) -> bool:
    """Replace x and the products of its branches by the results of one call.

    Returns False where no call can take the chain's place. `flows`, the nodes of the graph and
    whether a gradient flows through them, follows what is replaced.
    """
    results = _read_outside(x, chain)
    if not results:
        return False

    emit = maker(x, group[0].node)
    factors = [
        tuple(emit(str(factor.target)) for factor in projection.factors) for projection in group
    ]
    code = code_of(chain.reads, chain.steps, results, f"recomputed {x.name}")
    formula = formula_of(chain, flows) if results == [x] else None
    call = emit(region(code, formula), (factors, *chain.reads))
    flows[call] = True

    # before x is replaced: what each product is made of shows by the x that it reads
    idle_nodes: list[fx.Node] = []
    for projection in group:
        idle_nodes += _nodes_of(projection)
    idle_nodes += chain.steps

    products = [projection.node for projection in group]
    for i, node in enumerate([*results, *products]):
        result = emit(getitem, (call, i))
        if "val" in node.meta:
            result.meta["val"] = node.meta["val"]
        flows[result] = flows.get(node, True)
        node.replace_all_uses_with(result)
    for node in reversed(idle_nodes):
        if not node.users:
            node.graph.erase_node(node)
            flows.pop(node, None)
    return True


def _read_outside(x: fx.Node, chain: Chain) -> list[fx.Node]:
    """Return x and the steps of its chain that other nodes read; empty if a read precedes x."""
    steps = set(chain.steps)
    nodes = [x]
    for step in chain.steps:
        if step is x:
            continue
        readers = [user for user in step.users if user not in steps]
        if any(reader < x for reader in readers):
            return []  # the call would come too late
        if readers:
            nodes.append(step)
    return nodes


def _nodes_of(projection: Projection) -> list[fx.Node]:
    """Return a product and the nodes that exist only for this product, inputs first."""
    nodes: list[fx.Node] = [projection.node]
    while nodes[-1].op != "get_attr":
        inputs = reversed(nodes[-1].all_input_nodes)
        nodes.append(next(node for node in inputs if node is not projection.x))
    return [*projection.factors, *reversed(nodes[:-1])]
