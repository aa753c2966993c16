"""Attention in the shapes that the exporter takes: four dimensions, and heads shared alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.fx.graph.attention import SHARED
from lora_fx.fx.graph.nodes import argument, shape_of


def rewrite_attention(graph: fx.Graph, node: fx.Node) -> None:
    """The exporter wants four dimensions, and heads that keys and values share alike."""
    query, key, values = (shape_of(operand) for operand in node.args[:3])
    if query is None or key is None or values is None:
        return
    shares_heads = argument(node, SHARED, False)
    if shares_heads and not (query[-3] != key[-3] == values[-3]):
        node.target = attention_of_unlike_heads
    elif len(query) < 4:
        node.target = attention_in_four


def attention_in_four(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Attention [n, d] or [batch, n, d] with the dimensions in front that the exporter wants."""
    missing = 4 - q.dim()
    q, k, v = (operand[(None,) * missing] for operand in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, *rest, **named)
    return y[(0,) * missing]


def attention_of_unlike_heads(
    q: Tensor, k: Tensor, v: Tensor, *rest: Any, enable_gqa: bool, **named: Any
) -> Tensor:
    """Attention with key heads and value heads repeated as often as each needs."""
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    return attention_in_four(q, k, v, *rest, **named)
