"""clean: replace ops that a capture writes out by the one op that they compute.

    attention(q, k, v, mask)            mask[…, i, j] = (j ≤ i), or 0 there and −∞ elsewhere
        → attention(q, k, v, is_causal)
    attention(q, k, v, mask)            mask true everywhere    → attention(q, k, v)
    attention(q, rep(k), rep(v))        each head repeated n times → attention(q, k, v, enable_gqa)
    x/2·(1 + F(r(x)))                   F = erf, r = x/√2, or F = tanh …  → gelu(x)
    dropout(x, 0), a slice that is all of x → x

Each is found in the graph (lora_fx.fx.graph.masks): a mask by what it lets through at small
sizes and at such as are beyond all numbers in it, repeated heads by shapes, GELU by the numbers
that the chain makes. A mask that depends on an input, is changed in place, or is made by other ops,
stays. Torch's definition of is_causal is j ≤ i, from the upper left corner. GELU's gradient is that
of the chain; in 16 bits one op rounds once where the chain rounds at every step.

This pass is torch's own: the ops are ATen's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import fx

from lora_fx.fx.graph.attention import ATTENTION, is_full_slice, plain_mask, shared_heads
from lora_fx.fx.graph.gelu import gelu_of
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.in_place import Writes
from lora_fx.fx.graph.masks import mask_form
from lora_fx.fx.graph.nodes import argument
from lora_fx.passes.base import PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class Clean:
    """Fold masks, repeated heads, GELUs and steps that do nothing."""

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph; a second run finds nothing to fold."""
        written = Writes(graph.graph).ever()
        form_of = cache(partial(mask_form, written=written))
        modified = False
        for node in list(graph.graph.nodes):
            if node.target is ATTENTION:
                modified |= plain_mask(node, form_of)
                modified |= shared_heads(node)
                continue
            if _does_nothing(node) and node not in written:
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
                modified = True
                continue
            gelu = gelu_of(node, written)
            if gelu is not None:
                _one_gelu(graph.graph, node, *gelu)
                modified = True
        if modified:
            graph.graph.eliminate_dead_code()
        return PassResult(graph, modified)


def _does_nothing(node: fx.Node) -> bool:
    if node.target is aten.dropout.default:
        return argument(node, "p") == 0.0 or not argument(node, "train")
    return is_full_slice(node)


def _one_gelu(graph: fx.Graph, node: fx.Node, x: fx.Node, approximate: str) -> None:
    with graph.inserting_before(node):
        gelu = graph.call_function(aten.gelu.default, (x,), {"approximate": approximate})
    gelu.meta = dict(node.meta)
    node.replace_all_uses_with(gelu)
