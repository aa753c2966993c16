"""Chains of products, written as products of two, which have rows in the op table.

A chain is associative. It starts at its first activation and goes outwards, x, W₁, W₂ as
(x W₁) W₂, so that each weight stands alone in one product with an activation.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.nodes import aten_ops, value

aten = torch.ops.aten

CHAINS = aten_ops("linalg_multi_dot chain_matmul")


def split_products(graph: fx.Graph) -> None:
    """Rewrite every chain of a graph; torch may choose another order, so last bits may differ."""
    moving: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op != "placeholder" and not any(n in moving for n in node.all_input_nodes):
            continue
        moving.add(node)
        if node.target in CHAINS:
            with graph.inserting_before(node):
                new = _chain(node, moving)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            moving.add(new)


def _chain(node: fx.Node, moving: Collection[fx.Node]) -> fx.Node:
    factors: Any = node.args[0]
    start = next(i for i, f in enumerate(factors) if f in moving)
    y: fx.Node = factors[start]
    for f in reversed(factors[:start]):
        y = _product(node, f, y)
    for f in factors[start + 1 :]:
        y = _product(node, y, f)
    return y


def _product(node: fx.Node, *factors: fx.Node) -> fx.Node:
    """A product in the place of a chain, in its scope."""
    new = node.graph.call_function(aten.matmul.default, factors)
    new.meta = {**node.meta, "val": aten.matmul.default(*map(value, factors))}
    return new
