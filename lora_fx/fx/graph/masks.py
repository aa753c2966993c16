"""Attention masks, recognised by the positions that they let through.

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
"""The limit below which a number that is added to a score removes the score."""


LARGEST = 2500
"""A mask with larger numbers in it, such as a long window, stays as it is."""


def mask_form(mask: fx.Node, written: Collection[fx.Node]) -> str:
    """The form of a mask: causal (j ≤ i, for a query i and a key j), open, or empty for others.

    Args:
        mask: Truths, or what is added to scores.
        written: Nodes that some op changes in place.
    """
    dependencies = set(reached([mask], _operands))
    nodes = [node for node in mask.graph.nodes if node in dependencies]
    for node in nodes:
        if not _is_size_or_device(node) and (node.target not in MASKING or node in written):
            return ""

    lengths = set[Any]()  # the symbols of how many queries and keys there are
    for size in (shape_of(mask) or ())[-2:]:
        if isinstance(size, torch.SymInt):
            lengths |= size.node.expr.free_symbols
    reach = _largest(nodes)
    if lengths and reach > LARGEST:
        return ""
    forms = _forms(nodes, lengths, reach)
    # along an axis of size 1 a mask is the same for all queries, or for all keys
    if forms == {"causal"} and "1" not in sizes_of(mask)[-2:]:
        return "causal"
    if forms == {"open"}:
        return "open"
    return ""


def _forms(nodes: Sequence[fx.Node], lengths: Collection[Any], reach: int) -> set[str]:
    """The forms of a mask at small sizes, and at such as are beyond all numbers in it.

    Args:
        nodes: What makes the mask, which is the last of them.
        lengths: The symbols of how many queries and keys there are. Where these are fixed, each of
            their places is looked at, and no larger sizes are needed.
        reach: How far the mask may look.
    """
    tries = [(2, 2), (3, 2), (5, 3)]
    if lengths:
        tries += [(reach + 3, 2), (5, reach + 3)]
    symbols = set[Any]()
    for node in nodes:
        if isinstance(value(node), torch.SymInt):
            symbols |= value(node).node.expr.free_symbols

    forms = set[str]()
    for length, other in tries:
        sizes = {}
        for place, symbol in enumerate(sorted(symbols, key=str)):
            sizes[symbol] = place + (length if symbol in lengths else other)
        try:
            forms.add(_form_at(nodes, sizes))
        except (RuntimeError, IndexError, ValueError):  # sizes that the ops do not take
            return {""}
    return forms


def _largest(nodes: Sequence[fx.Node]) -> int:
    """The farthest that a mask can look: the sum of the constants that its last node reads."""
    reach: dict[fx.Node, int] = {}
    for node in nodes:
        size = value(node)
        leaves = tree_leaves((node.args, node.kwargs))
        if isinstance(size, torch.SymInt):
            leaves = [int(atom) for atom in size.node.expr.atoms() if atom.is_Integer]
        reach[node] = 0
        for leaf in leaves:
            if isinstance(leaf, fx.Node):
                reach[node] += reach.get(leaf, 0)
            elif isinstance(leaf, (int, float)) and leaf != END and LOWEST < leaf < math.inf:
                reach[node] += min(math.ceil(abs(leaf)), LARGEST + 1)
    return reach[nodes[-1]]


def _is_size_or_device(node: fx.Node) -> bool:
    """Whether a node is a size, or the device of an input."""
    return isinstance(value(node), (torch.SymInt, int)) or node.target is getattr


def _operands(node: fx.Node) -> list[fx.Node]:
    """The operands that decide the numbers of a node; not one of which it reads only the dtype."""
    if _is_size_or_device(node):
        return []
    operands = node.all_input_nodes
    position = SHAPE_ONLY.get(op_name(node))
    if position is None:
        return operands
    dtype_sources = node.args[position : position + 1]
    return [operand for operand in operands if operand not in dtype_sources]


def _form_at(nodes: Sequence[fx.Node], sizes: Mapping[object, int]) -> str:
    """The form of the last of some nodes, run at sizes by their symbols; empty for any other."""
    values: dict[fx.Node, Argument] = {}

    def read(arg: Any) -> Argument:
        if isinstance(arg, torch.device):
            return torch.device("cpu")  # that of the capture may be meta, or of another machine
        if not isinstance(arg, fx.Node):
            plain: Argument = arg
            return plain
        if arg not in values:
            return torch.empty(0, dtype=dtype_of(arg))
        return values[arg]

    mask = torch.ones(())
    for node in nodes:
        captured = value(node)
        if node.target is getattr:
            values[node] = torch.device("cpu")
        elif isinstance(captured, torch.SymInt):
            values[node] = int(captured.node.expr.xreplace(sizes))
        elif isinstance(captured, int):
            values[node] = captured
        else:
            args, kwargs = map_aggregate((node.args, node.kwargs), read)
            mask = node.target(*args, **kwargs)  # type: ignore[operator]
            values[node] = mask
            if not _is_exact(mask):
                return ""

    if mask.dtype == torch.bool:
        allowed = mask
    elif _removes_or_adds_nothing(mask):
        allowed = mask == 0
    else:
        return ""
    if bool(allowed.all()):
        return "open"
    if allowed.dim() > 1 and torch.equal(allowed, torch.ones_like(allowed).tril()):
        return "causal"
    return ""


def _is_exact(tensor: torch.Tensor) -> bool:
    """Whether a float holds none of a tensor's numbers that it may have rounded."""
    if tensor.dtype in (torch.int32, torch.int64):
        return True
    only_truths = bool(((tensor == 0) | (tensor == 1)).all())
    return only_truths or _removes_or_adds_nothing(tensor)


def _removes_or_adds_nothing(tensor: torch.Tensor) -> bool:
    """Whether a tensor, added to scores, removes some of them and leaves the others."""
    return tensor.is_floating_point() and bool(((tensor == 0) | (tensor <= LOWEST)).all())
