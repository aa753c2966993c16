"""Removal of every output of a program except the loss."""

from __future__ import annotations

from typing import Any

from torch import fx

from lora_fx.fx.train.loss import field_of
from lora_fx.fx.trees import tree_unflatten


def keep_loss(graph: fx.Graph, spec: Any) -> bool:
    """Remove every output except the one named `loss`; return False if there is none.

    Args:
        graph: Of a program, whose outputs are flat; what made the others goes too.
        spec: How the outputs become what the model returns.
    """
    output = graph.output_node()
    (leaves,) = output.args
    assert isinstance(leaves, (tuple, list))
    place = field_of(tree_unflatten(list(range(len(leaves))), spec), "loss")
    if not isinstance(place, int) or len(leaves) == 1:
        return False
    output.args = (tuple(leaf if i == place else None for i, leaf in enumerate(leaves)),)
    graph.eliminate_dead_code()
    return True
