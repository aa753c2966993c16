"""share: join the first products of branches that read the same value.

tᵢ = x·aᵢᵀ for i = 1 … n        becomes        (t₁ … tₙ) = split(x·[a₁; …; aₙ]ᵀ)

q, k and v of an attention, gate and up of an MLP: x is read once where it was read n times, and
products of a few columns are slow ones. Backward has one product for all ∂L/∂aᵢ, and one for their
part of ∂L/∂x. The a's stay tensors of their own. Left alone: a branch with a dropout of its own,
whose input is another value or is written to in between, factors that are read through a view, and
branches of different blocks, since the tensors of a block may be gathered for its own forward only.

This pass is torch's own: it reads the nodes that the fx emitter writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from lora_fx.fx.dotted_names import parameter_of
from lora_fx.fx.graph.branch_nodes import Projection, maker, projections
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.in_place import Writes
from lora_fx.fx.graph.nodes import block_of
from lora_fx.passes.base import PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class Share:
    """Join the first products of branches that read the same value.

    Attributes:
        blocks: Paths of modules that will be functions of their own; products stay in one.
        free: Read the ranks from the a's at every call, since others may take their place.
    """

    blocks: Sequence[str] = ()
    free: bool = False

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run changes nothing."""
        groups = _groups(graph, self.blocks)
        for group in groups:
            _join(graph, group, self.free)
        if groups:
            graph.graph.eliminate_dead_code()
        return PassResult(graph, bool(groups))


def _groups(graph: FxGraph, blocks: Sequence[str]) -> list[list[Projection]]:
    """Return groups of two or more products of one value, in one block with no write in between."""
    writes = Writes(graph.graph)
    groups: dict[tuple[fx.Node, str], list[list[Projection]]] = {}
    for projection in projections(graph.graph):
        x_and_block = (projection.x, block_of(projection.node, blocks))
        groups_of_x = groups.setdefault(x_and_block, [[]])
        group = groups_of_x[-1]
        if group and writes.between(projection.x, group[0].node, projection.node):
            group = []  # the value is another one from here on
            groups_of_x.append(group)
        group.append(projection)

    joined: list[list[Projection]] = []
    for groups_of_x in groups.values():
        joined += [group for group in groups_of_x if len(group) > 1]
    return joined


def _join(graph: FxGraph, group: Sequence[Projection], free: bool) -> None:
    """Replace a group of products by one product with all a's stacked, followed by a split."""
    x = group[0].x
    emit = maker(group[0].node, group[0].node)
    factors: list[fx.Node] = []
    ranks: list[int | fx.Node] = []
    for projection in group:
        names = [str(factor.target) for factor in projection.factors]
        factors += [emit(name) for name in names]
        ranks.append(sum(len(parameter_of(graph.root, name)) for name in names))
    if free and len(factors) == len(group):
        ranks = [emit(aten.sym_size.int, (factor, 0)) for factor in factors]

    a = emit(aten.cat.default, (factors,))
    cast = emit(aten.type_as.default, (a, x))
    transposed = emit(aten.permute.default, (cast, [1, 0]))
    t = emit(aten.matmul.default, (x, transposed))
    pieces = emit(aten.split_with_sizes.default, (t, ranks, -1))
    for i, projection in enumerate(group):
        projection.node.replace_all_uses_with(emit(getitem, (pieces, i)))
