"""Products of three and more operands, written as products of two, which have rows in the op table.

Such a product is associative. It starts at its first activation and goes outwards, x, W₁, W₂ as
(x W₁) W₂, so that each weight stands alone in one product with an activation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.nodes import shape_of, value
from lora_fx.ir.kinds import letters

aten = torch.ops.aten


def split_products(graph: fx.Graph) -> None:
    """Rewrite every such op of a graph that multiplies several constants with activations.

    Where torch would have multiplied two constants first, the last bits of the result differ.
    """
    moving: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op != "placeholder" and not any(n in moving for n in node.all_input_nodes):
            continue
        moving.add(node)
        split = _SPLITTERS.get(node.target)
        if split is None:
            continue
        with graph.inserting_before(node):
            new = split(node, moving)
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            moving.add(new)


def _call(node: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A node in the place of another one, in its scope."""
    new = node.graph.call_function(target, args)
    new.meta = {**node.meta, "val": target(*fx.node.map_arg(args, value))}
    return new


def _chain(node: fx.Node, moving: Collection[fx.Node]) -> fx.Node:
    factors: Any = node.args[0]
    start = next(i for i, f in enumerate(factors) if f in moving)
    y: fx.Node = factors[start]
    for f in reversed(factors[:start]):
        y = _call(node, aten.matmul.default, f, y)
    for f in factors[start + 1 :]:
        y = _call(node, aten.matmul.default, y, f)
    return y


def _einsum(node: fx.Node, moving: Collection[fx.Node]) -> fx.Node | None:
    equation, factors = str(node.args[0]).replace(" ", ""), list[Any](node.args[1])  # type: ignore[arg-type]
    if sum(f not in moving for f in factors) < 2:
        return None  # the op table has a row for one weight among any number of activations
    *terms, result = letters(equation, [len(shape_of(f) or ()) for f in factors])
    start = next(i for i, f in enumerate(factors) if f in moving)
    y: fx.Node = factors.pop(start)
    term = terms.pop(start)
    while factors:
        i = next((i for i, t in enumerate(terms) if set(t) & set(term)), 0)
        other = terms.pop(i)
        after = "".join(terms) + result
        both = "".join(c for c in dict.fromkeys(term + other) if c in after) if terms else result
        y = _call(node, aten.einsum.default, f"{term},{other}->{both}", [y, factors.pop(i)])
        term = both
    return y


_SPLITTERS: dict[Any, Callable[[fx.Node, Collection[fx.Node]], fx.Node | None]] = {
    aten.linalg_multi_dot.default: _chain,
    aten.chain_matmul.default: _chain,
    aten.einsum.default: _einsum,
}
