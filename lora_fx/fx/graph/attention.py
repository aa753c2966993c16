"""Attention ops of a graph: masks and repeated heads that an argument can replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from lora_fx.fx.graph.nodes import (
    argument,
    shape_of,
)

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
MASK = "attn_mask"
CAUSAL = "is_causal"
SHARED = "enable_gqa"
END = 9223372036854775807


def give(node: fx.Node, **changes: object) -> None:
    """Set arguments by their names in the op's schema; those after query, key, value by keyword."""
    slots = node.target._schema.arguments  # type: ignore[union-attr]
    arguments = {slot.name: argument(node, slot.name) for slot in slots} | changes
    defaults = {slot.name: slot.default_value for slot in slots[3:] if slot.has_default_value()}
    node.args = tuple(arguments.pop(slot.name) for slot in slots[:3])
    node.kwargs = {
        name: setting
        for name, setting in arguments.items()
        if setting is not None and setting != defaults.get(name)
    }


def plain_mask(node: fx.Node, form_of: Callable[[fx.Node], str]) -> bool:
    """Replace a mask that is causal, or lets everything through, at every size; say if it was."""
    mask = argument(node, MASK)
    if not isinstance(mask, fx.Node) or argument(node, CAUSAL, False):
        return False
    form = form_of(mask)
    if not form:
        return False
    give(node, attn_mask=None, is_causal=form == "causal")
    return True


def shared_heads(node: fx.Node) -> bool:
    """Let key and value heads be shared by the op where the graph repeats them; say if it did."""
    if argument(node, SHARED, False):
        return False
    keys = _repeated_heads(argument(node, "key"))
    values = _repeated_heads(argument(node, "value"))
    if keys is None or values is None or keys.times != values.times:
        return False
    give(node, key=keys.heads, value=values.heads, enable_gqa=keys.times > 1)
    return True


class _Repeated(NamedTuple):
    """Heads [n, heads, length, width], and how often each is repeated."""

    heads: fx.Node
    times: int


def _repeated_heads(node: Any) -> _Repeated | None:
    """The heads k that a node repeats, in one of two forms; None for anything else.

    1. k.repeat_interleave(times, 1);
    2. k.unsqueeze(2).expand(n, heads, times, length, width).reshape(n, heads·times, …).
    """
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.repeat_interleave.self_int:
        return _interleaved(node)
    if node.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return _expanded(node)
    return None


def _interleaved(node: fx.Node) -> _Repeated | None:
    """The first form."""
    heads = argument(node, "self")
    times = argument(node, "repeats")
    along_heads = argument(node, "dim") in (1, -3)
    if not along_heads or len(sizes_of(heads)) != 4 or not isinstance(times, int):
        return None
    return _Repeated(heads, times)


def _expanded(node: fx.Node) -> _Repeated | None:
    """The second form."""
    expanded = unsliced(node.args[0])
    if not isinstance(expanded, fx.Node) or expanded.target is not aten.expand.default:
        return None
    unsqueezed = unsliced(expanded.args[0])
    if not isinstance(unsqueezed, fx.Node) or unsqueezed.target is not aten.unsqueeze.default:
        return None
    if argument(unsqueezed, "dim") not in (2, -3):
        return None
    heads = unsliced(unsqueezed.args[0])
    if len(sizes_of(heads)) != 4 or len(sizes_of(expanded)) != 5:
        return None

    n, n_heads, length, width = sizes_of(heads)
    times = sizes_of(expanded)[2]
    if not times.isdigit() or not n_heads.isdigit():
        return None
    if sizes_of(expanded) != (n, n_heads, times, length, width):
        return None
    if sizes_of(node) != (n, str(int(n_heads) * int(times)), length, width):
        return None
    return _Repeated(heads, int(times))


def sizes_of(node: object) -> tuple[str, ...]:
    """The sizes of a node's tensor as text, symbols by their names; empty for anything else."""
    return tuple(str(size) for size in shape_of(node) or ())


def unsliced(node: Any) -> Any:
    """The input of a slice that keeps all of it; else the node itself."""
    while isinstance(node, fx.Node) and is_full_slice(node):
        node = node.args[0]
    return node


def is_full_slice(node: fx.Node) -> bool:
    """True for a slice from 0 to the end in steps of 1."""
    if node.target is not aten.slice.Tensor or argument(node, "step") != 1:
        return False
    return argument(node, "start") in (None, 0) and argument(node, "end") in (None, END)
