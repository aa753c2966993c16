"""Dropout that an input, the seed, determines.

The dropped elements depend on the seed, on the position and on the dropout, by integers below a
prime, so that torch and every runtime drop the same elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.fx.graph.nodes import argument

aten = torch.ops.aten

PRIME = 2**31 - 1


def seed_dropouts(graph: fx.Graph) -> bool:
    """Make the dropouts of a graph depend on a new input, the seed; False if there are none."""
    dropouts = [node for node in graph.nodes if _drops(node)]
    if not dropouts:
        return False
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        seed = graph.placeholder("seed")
    seed.meta["val"] = torch.zeros((), dtype=torch.int64)
    for which, node in enumerate(dropouts):
        if node.target is aten.dropout.default:
            node.args = (node.args[0], argument(node, "p"), seed, which)
            node.kwargs = {}
            node.target = dropped
        else:
            _seed_attention(node, seed, which)
    return True


def _seed_attention(node: fx.Node, seed: fx.Node, which: int) -> None:
    """Make the dropout of an attention's weights depend on the seed."""
    mask = argument(node, "attn_mask")
    p = argument(node, "dropout_p")
    named = {name: argument(node, name) for name in ("is_causal", "scale", "enable_gqa")}
    node.target = attention_with_dropout
    node.args = (*node.args[:3], mask, p, seed, which)
    node.kwargs = named


def _drops(node: fx.Node) -> bool:
    if node.target is aten.dropout.default:
        return bool(argument(node, "train")) and argument(node, "p") > 0
    attention = node.target is aten.scaled_dot_product_attention.default
    return attention and bool(argument(node, "dropout_p"))


def dropped(x: Tensor, p: float, seed: Tensor, which: int) -> Tensor:
    """Drop a share p of x, by the seed; divide the rest by 1 − p."""
    place = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    salt = (seed % PRIME * 48271 + which * 69621 + 1) % PRIME
    number = (place % PRIME * 16807 + salt) % PRIME
    for add in (12345, 271828, 314159):  # a square is what no line of places keeps in order
        number = (number * number + salt + add) % PRIME
    return torch.where(number >= int(p * PRIME), x / (1 - p), 0.0)


def attention_with_dropout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    p: float,
    seed: Tensor,
    which: int,
    **named: Any,
) -> Tensor:
    """Compute attention with dropout of its weights, by the seed."""
    if named.get("enable_gqa"):
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    scores = q @ k.transpose(-1, -2) * (named.get("scale") or q.shape[-1] ** -0.5)
    if named.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    if mask is not None:
        scores = scores + mask
    # a row that is masked out, as of padding on the left, is 0 as in torch, not NaN
    return dropped(aten._safe_softmax(scores, -1), p, seed, which) @ v
