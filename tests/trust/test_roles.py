"""Roles of attention come from what the data flow proves: softmax(q kᵀ) v, written in any way.

On 788628f `include="role:v"` on nn.MultiheadAttention with need_weights=True adapted q and k too
(all three parts were "v"), plain self-attention of layers without telling names had no role at
all, and a name won over what the graph shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
ZEROS = torch.zeros(2, 5, 5)


class Layer(nn.Module):
    """Three layers a, b and c, and attention written by hand."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.a(x), self.b(x), self.c(x))


def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.view(*t.shape[:2], 2, 4).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(ZEROS[0] > 0, -1e9)
    return (F.dropout(scores.softmax(-1), 0.1, False) @ v).transpose(1, 2).flatten(2)


def letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bkd,bqd->bqk", k, q).softmax(-1)
    return torch.einsum("bkd,bqk->bqd", v, weights)


WAYS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "written out": (lambda q, k, v: (q @ k.mT / 3).softmax(-1) @ v, "qkv"),
    "in heads, with a mask and dropout": (heads, "qkv"),
    "in letters, the keys first": (letters, "qkv"),
    "with the mask in the product": (
        lambda q, k, v: torch.bmm(torch.baddbmm(ZEROS, q, k.mT).softmax(-1), v),
        "qkv",
    ),
    "keys along the rows": (lambda q, k, v: v.mT @ (k @ q.mT).softmax(-2), "qkv"),
    "fused": (F.scaled_dot_product_attention, "qkv"),
    "one layer is queries, keys and values": (lambda q, k, v: (q @ q.mT).softmax(-1) @ q, "   "),
    "one layer is keys and values": (lambda q, k, v: (q @ k.mT).softmax(-1) @ k, "q  "),
    "no softmax": (lambda q, k, v: (q @ k.mT) @ v, "   "),
    "nothing is weighed": (lambda q, k, v: (q @ k.mT).softmax(-1), "   "),
    "gates": (lambda q, k, v: (q @ k.mT).sigmoid() @ v, "   "),
}


@pytest.mark.parametrize("way", WAYS)
def test_attention_by_hand(way: str) -> None:
    attend, want = WAYS[way]
    found = lora_fx.find(Layer(attend).eval(), (X,))
    roles = {t.key[0]: t.role for t in found.targets}
    assert {k: r for k, r in roles.items() if r} == {
        k: r for k, r in zip("abc", want, strict=True) if r != " "
    }


class Torch(nn.Module):
    """nn.MultiheadAttention with a key padding mask."""

    def __init__(self, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.m(x, x, x, key_padding_mask=mask, need_weights=self.need_weights)[0]
        return y


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights: bool, options: dict[str, Any]) -> None:
    model = Torch(need_weights, **options).eval()
    args = (X, torch.zeros(2, 5, dtype=torch.bool))
    parts = lora_fx.find(model, args)["m.in_proj_weight"].parts
    assert [(r, k.removeprefix("m.in_proj_weight")) for r, k in parts] == [
        ("q", "[0:8]"),
        ("k", "[8:16]"),
        ("v", "[16:24]"),
    ]
    module = lora_fx.insert(model, args, rank=2, include="role:v")
    assert [*module.updates] == ["m.in_proj_weight[16:24]"]


def test_what_the_graph_shows_comes_before_a_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.k_proj(x), self.q_proj(x), self.v_proj(x))

    found = lora_fx.find(Named().eval(), (X,))
    assert {t.key[0]: t.role for t in found.targets} == {"q": "k", "k": "q", "v": "v"}
