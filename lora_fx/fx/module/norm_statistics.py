"""Running statistics in train graphs: if frozen, norms use them but do not update them."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def freeze_norms(graph: fx.Graph) -> bool:
    """Make batch and instance norms use running statistics without updating them.

    The adapter then trains under the statistics that it will be served with. Counters of seen
    batches stop too. Returns whether anything changed.
    """
    changed = False
    for node in list(graph.nodes):
        if node.target in (aten.batch_norm.default, aten.instance_norm.default):
            if node.args[3] is not None and node.args[5]:
                node.update_arg(5, False)
                changed = True
        elif _counts_batches(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            changed = True
    return changed


def _counts_batches(node: fx.Node) -> bool:
    """Whether a node increments a norm's counter of seen batches."""
    if node.target not in (aten.add_.Tensor, aten.copy_.default, aten.add.Tensor):
        return False
    counter = node.args[0]
    if not isinstance(counter, fx.Node) or counter.op != "get_attr":
        return False
    return str(counter.target).endswith("num_batches_tracked")
