"""Chains of products, rewritten as products of two factors, which the op table supports.

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
    """Rewrite every chain of a graph; last bits may differ, since torch may use another order."""
    activations: set[fx.Node] = set()
    for node in list(graph.nodes):
        reads_activation = any(operand in activations for operand in node.all_input_nodes)
        if node.op != "placeholder" and not reads_activation:
            continue
        activations.add(node)
        if node.target in CHAINS:
            with graph.inserting_before(node):
                product = _chain(node, activations)
            node.replace_all_uses_with(product)
            graph.erase_node(node)
            activations.add(product)


def _chain(node: fx.Node, activations: Collection[fx.Node]) -> fx.Node:
    """Multiply a chain's factors, from its first activation outwards."""
    factors: Any = node.args[0]
    start = next(i for i, factor in enumerate(factors) if factor in activations)
    y: fx.Node = factors[start]
    for factor in reversed(factors[:start]):
        y = _product(node, factor, y)
    for factor in factors[start + 1 :]:
        y = _product(node, y, factor)
    return y


def _product(node: fx.Node, *factors: fx.Node) -> fx.Node:
    """Make a product at the place of a chain, in its scope."""
    product = node.graph.call_function(aten.matmul.default, factors)
    product.meta = {**node.meta, "val": aten.matmul.default(*map(value, factors))}
    return product
