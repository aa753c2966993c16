"""Attention masks, recognised by what they let through.

A mask that is made of sizes and constants alone runs at small sizes, and at such as are larger
than all numbers in it together. The ops that may make one give whole numbers, truths and what
removes scores, all exactly, and none of them multiplies: beyond, the mask goes on as it began.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import Argument, map_aggregate

from lora_fx.fx.graph.attention import END, sizes_of
from lora_fx.fx.graph.flow import SHAPE_ONLY
from lora_fx.fx.graph.nodes import (
    dtype_of,
    op_name,
    overloads,
    reached,
    shape_of,
    value,
)
from lora_fx.fx.trees import tree_leaves

MASKING = {
    *overloads(None, "arange", "ones", "zeros", "full", "new_ones", "new_zeros", "new_full"),
    *overloads(None, "add", "sub", "diff", "cumsum", "where", "masked_fill"),
    *overloads(None, "le", "lt", "ge", "gt", "eq", "ne"),
    *overloads(None, "bitwise_and", "logical_and", "__and__", "bitwise_not", "logical_not"),
    *overloads(None, "tril", "triu", "to", "_to_copy", "clone", "alias"),
    *overloads(None, "expand", "unsqueeze", "transpose", "slice", "index"),
}


LOWEST = -1e30
"""What adds at most this to a score removes it: −∞, and the lowest of float32 and bfloat16."""


LARGEST = 2500
"""A mask with larger numbers in it, such as a long window, stays as it is."""


def mask_form(mask: fx.Node, written: Collection[fx.Node]) -> str:
    """What a mask is: causal (j ≤ i, for a query i and a key j), open, or empty for anything else.

    Args:
        mask: Truths, or what is added to scores.
        written: Nodes that some op changes in place.
    """
    nodes = set(reached([mask], _operands))
    made = [n for n in mask.graph.nodes if n in nodes]
    if any(not _is_given(n) and (n.target not in MASKING or n in written) for n in made):
        return ""
    sizes = [value(n).node.expr for n in made if isinstance(value(n), torch.SymInt)]
    ends = [n.node.expr for n in (shape_of(mask) or ())[-2:] if isinstance(n, torch.SymInt)]
    lengths = {s for end in ends for s in end.free_symbols}
    most = _largest(made)
    if lengths and most > LARGEST:
        return ""
    # where queries and keys have fixed lengths, each of their places is looked at
    tries = [(2, 2), (3, 2), (5, 3), *([(most + 3, 2), (5, most + 3)] if lengths else [])]
    symbols = sorted({s for size in sizes for s in size.free_symbols}, key=str)
    forms = set[str]()
    for length, other in tries:
        at = {s: i + (length if s in lengths else other) for i, s in enumerate(symbols)}
        try:
            forms.add(_form_at(made, at))
        except (RuntimeError, IndexError, ValueError):  # sizes that the ops do not take
            return ""
    # along an axis of size 1 a mask is the same for all queries, or for all keys
    if forms == {"causal"} and "1" not in sizes_of(mask)[-2:]:
        return "causal"
    return "open" if forms == {"open"} else ""


def _largest(made: Sequence[fx.Node]) -> int:
    """How far the last of some nodes may look: all numbers behind it, as often as they are read."""
    reach: dict[fx.Node, int] = {}
    for node in made:
        number = value(node)
        leaves = tree_leaves((node.args, node.kwargs))
        if isinstance(number, torch.SymInt):
            leaves = [int(a) for a in number.node.expr.atoms() if a.is_Integer]
        numbers = (a for a in leaves if isinstance(a, (int, float)) and a != END and a > LOWEST)
        reach[node] = sum(
            min(math.ceil(abs(a)), LARGEST + 1) if a < math.inf else 0 for a in numbers
        )
        reach[node] += sum(reach.get(n, 0) for n in leaves if isinstance(n, fx.Node))
    return reach[made[-1]]


def _is_given(node: fx.Node) -> bool:
    """Whether a node is a size, or the device of an input."""
    return isinstance(value(node), (torch.SymInt, int)) or node.target is getattr


def _operands(node: fx.Node) -> list[fx.Node]:
    """What decides the numbers that a node makes; not a tensor of which the dtype alone is read."""
    if _is_given(node):
        return []
    place = SHAPE_ONLY.get(op_name(node))
    like = node.args[place : place + 1] if place is not None else ()
    return [n for n in node.all_input_nodes if n not in like]


def _form_at(made: Sequence[fx.Node], sizes: Mapping[object, int]) -> str:
    """The form of the last of some nodes, run at sizes by their symbols; empty for any other."""
    values: dict[fx.Node, Argument] = {}

    def read(x: Any) -> Argument:
        if isinstance(x, torch.device):
            return torch.device("cpu")  # that of the capture may be meta, or of another machine
        if isinstance(x, fx.Node) and x not in values:
            return torch.empty(0, dtype=dtype_of(x))
        return values[x] if isinstance(x, fx.Node) else x

    mask = torch.ones(())
    for node in made:
        if node.target is getattr:
            values[node] = torch.device("cpu")
        elif isinstance(number := value(node), torch.SymInt):
            values[node] = int(number.node.expr.xreplace(sizes))
        elif isinstance(number, int):
            values[node] = number
        else:
            args, kwargs = map_aggregate((node.args, node.kwargs), read)
            values[node] = mask = node.target(*args, **kwargs)  # type: ignore[operator]
            adds = mask.is_floating_point() and bool(((mask == 0) | (mask <= LOWEST)).all())
            truths = bool(((mask == 0) | (mask == 1)).all())
            if not (adds or truths or mask.dtype in (torch.int32, torch.int64)):
                return ""  # numbers that a float may round
    if mask.dtype != torch.bool and not adds:
        return ""
    truth = mask if mask.dtype == torch.bool else mask == 0
    causal = truth.dim() > 1 and torch.equal(truth, torch.ones_like(truth).tril())
    return "open" if bool(truth.all()) else "causal" if causal else ""
