"""Attention ops of a graph: masks and repeated heads that an argument can stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph.nodes import (
    argument,
    shape_of,
)

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
MASK, CAUSAL, SHARED = "attn_mask", "is_causal", "enable_gqa"
END = 9223372036854775807


def give(node: fx.Node, **changes: object) -> None:
    """Set arguments by their names in the op's schema; those after query, key, value by keyword."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    now = {a.name: argument(node, a.name) for a in schema} | changes
    defaults = {a.name: a.default_value for a in schema[3:] if a.has_default_value()}
    node.args = tuple(now.pop(a.name) for a in schema[:3])
    node.kwargs = {k: v for k, v in now.items() if v is not None and v != defaults.get(k)}


def plain_mask(node: fx.Node, form_of: Callable[[fx.Node], str]) -> bool:
    """Replace a mask that is causal, or lets everything through, at every size; say if it was."""
    mask = argument(node, MASK)
    if not isinstance(mask, fx.Node) or argument(node, CAUSAL, False) or not form_of(mask):
        return False
    give(node, attn_mask=None, is_causal=form_of(mask) == "causal")
    return True


def shared_heads(node: fx.Node) -> bool:
    """Let key and value heads be shared by the op where the graph repeats them; say if it did."""
    if argument(node, SHARED, False):
        return False
    key, value = _repeated(argument(node, "key")), _repeated(argument(node, "value"))
    if key is None or value is None or key[1] != value[1]:
        return False
    times = key[1]
    give(node, key=key[0], value=value[0], enable_gqa=times > 1)
    return True


def _repeated(node: Any) -> tuple[fx.Node, int] | None:
    """(k [n, heads, length, width], times) of what repeats each head of k `times` over.

    That is k.unsqueeze(2).expand(n, heads, times, length, width).reshape(n, heads·times, …), and
    k.repeat_interleave(times, 1).
    """
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.repeat_interleave.self_int:
        k, times = argument(node, "self"), argument(node, "repeats")
        by_head = len(sizes_of(k)) == 4 and argument(node, "dim") in (1, -3)
        return (k, times) if by_head and isinstance(times, int) else None
    if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return None
    wide = whole(node.args[0])
    if not isinstance(wide, fx.Node) or wide.target is not aten.expand.default:
        return None
    stretched = whole(wide.args[0])
    if not isinstance(stretched, fx.Node) or stretched.target is not aten.unsqueeze.default:
        return None
    k = whole(stretched.args[0])
    before, between, after = (sizes_of(n) for n in (k, wide, node))
    if len(before) != 4 or len(between) != 5 or argument(stretched, "dim") not in (2, -3):
        return None
    times, heads = between[2], before[1]
    if not times.isdigit() or not heads.isdigit():
        return None
    n, _, length, width = before
    repeats = between == (n, heads, times, length, width)
    joins = after == (n, str(int(heads) * int(times)), length, width)
    return (k, int(times)) if repeats and joins else None


def sizes_of(node: object) -> tuple[str, ...]:
    """The sizes of a node's tensor as text, symbols by their names; empty for anything else."""
    return tuple(str(s) for s in shape_of(node) or ())


def whole(node: Any) -> Any:
    """What a node is a slice of, where the slice is all of it."""
    while isinstance(node, fx.Node) and is_whole(node):
        node = node.args[0]
    return node


def is_whole(node: fx.Node) -> bool:
    """True for a slice from 0 to the end in steps of 1."""
    if node.target is not aten.slice.Tensor:
        return False
    start, step, end = (argument(node, k) for k in ("start", "step", "end"))
    return start in (None, 0) and step == 1 and (end is None or end == END)
