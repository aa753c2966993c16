"""share: branches that read one value run their first products as one.

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
    """Join the first products of branches.

    Attributes:
        blocks: Paths of modules that will be functions of their own; products stay in one.
        free: Read the ranks from the a's at every call, since others may take their place.
    """

    blocks: Sequence[str] = ()
    free: bool = False

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds one product for each value."""
        groups: dict[tuple[fx.Node, str], list[list[Projection]]] = {}
        writes = Writes(graph.graph)
        for p in projections(graph.graph):
            held = groups.setdefault((p.x, block_of(p.node, self.blocks)), [])
            if not held or writes.between(p.x, held[-1][0].node, p.node):
                held.append([])  # the value is another one from here on
            held[-1].append(p)
        several = [g for held in groups.values() for g in held if len(g) > 1]
        for group in several:
            _join(graph, group, self.free)
        if several:
            graph.graph.eliminate_dead_code()
        return PassResult(graph, bool(several))


def _join(graph: FxGraph, group: Sequence[Projection], free: bool) -> None:
    first = group[0]
    emit = maker(first.node, first.node)
    factors = [a for p in group for a in p.factors]
    held = [emit(str(f.target)) for f in factors]
    ranks: list[int] | list[fx.Node]
    ranks = [sum(len(parameter_of(graph.root, str(a.target))) for a in p.factors) for p in group]
    if free and len(held) == len(group):
        ranks = [emit(aten.sym_size.int, (a, 0)) for a in held]
    a = emit(aten.cat.default, (held,))
    cast = emit(aten.type_as.default, (a, first.x))
    turned = emit(aten.permute.default, (cast, [1, 0]))
    t = emit(aten.matmul.default, (first.x, turned))
    parts = emit(aten.split_with_sizes.default, (t, ranks, -1))
    for i, p in enumerate(group):
        p.node.replace_all_uses_with(emit(getitem, (parts, i)))
