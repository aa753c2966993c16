"""chunk: compute the scores of a wide head and their cross entropy a few rows at a time.

s = f(x), L = CE(s, y)        becomes        L = chunked_loss(x; y)

where f is a head's product, its branch, and what stands by elements behind it: a scale, a softcap,
a cast. Whole, the scores of all rows, what autograd keeps of them and their gradient are several
times [rows, classes]. See lora_fx.fx.loss_in_chunks. Left alone: scores that something else reads,
such as an output of the graph, a loss with a weight for each class, a head that is part of a block
that the loss is not, since its tensors may be gathered for its own forward only, and few classes.

This pass is torch's own: what is kept for backward is no property of other IRs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.loss_head import SAME_ROWS, LossHead, loss_heads
from lora_fx.fx.graph.nodes import argument
from lora_fx.fx.loss_in_chunks import ChunkedLoss, Scores, loss_in_chunks
from lora_fx.fx.module.codegen import function
from lora_fx.passes.base import PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class Chunk:
    """Replace the scores of wide heads and their losses by losses in chunks.

    Attributes:
        blocks: Paths of modules that will be functions of their own; a loss stays in one.
    """

    blocks: Sequence[str] = ()

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds no cross entropy of scores."""
        heads = loss_heads(graph.graph, self.blocks)
        for head in heads:
            _replace(head)
        if heads:
            graph.graph.eliminate_dead_code()
        return PassResult(graph, bool(heads))


def _replace(head: LossHead) -> None:
    """Replace a head and its loss by one call."""
    node = head.loss
    loss = ChunkedLoss(
        _scores(head),
        head.classes,
        mean=argument(node, "reduction") == 1,
        ignored=argument(node, "ignore_index"),
        smoothing=argument(node, "label_smoothing"),
    )
    graph = node.graph
    with graph.inserting_before(node):
        inputs = [_cut(graph, x, head) for x in head.inputs]
        call = graph.call_function(
            loss_in_chunks(loss), (inputs, list(head.operands), node.args[1])
        )
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)


def _cut(graph: fx.Graph, x: fx.Node, head: LossHead) -> fx.Node:
    """Return the rows of an input that have a score."""
    for cut in head.cuts:
        x = graph.call_function(aten.slice.Tensor, (x, *cut))
        x.meta["nn_module_stack"] = head.loss.meta.get("nn_module_stack", {})
    return x


def _scores(head: LossHead) -> Scores:
    """Return the steps of a head as a function of rows [rows, n] and operands."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in (*head.inputs, *head.operands)}
    for step in head.steps:
        if step.target in SAME_ROWS or step.target is aten.slice.Tensor:
            copies[step] = copies[step.args[0]]  # type: ignore[index]
        else:
            copies[step] = graph.node_copy(step, copies.__getitem__)
    graph.output(copies[head.steps[-1]])
    code = function(graph, f"scores of {head.loss.name}")
    return lambda *values: code(None, *values)
