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


class Layers(nn.Module):
    """Layers by name, and what runs them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **widths: tuple[int, int]) -> None:
        super().__init__()
        self.mlp = nn.Module()
        for name, (width, depth) in widths.items():
            self.mlp.add_module(name, nn.Linear(depth, width))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.mlp, x)


def equivariant(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.o(torch.einsum("bij,bjf->bif", x @ x.mT, m.wv(x))))


def squeeze_excite(m: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(m.fc2(torch.relu(m.fc1(x.mean(1, keepdim=True)))))


def block(m: Any, x: Tensor) -> Tensor:
    return x + m.fc2(F.gelu(m.fc1(x)))


def normed(m: Any, x: Tensor) -> Tensor:
    y = m.fc2(F.softsign(m.fc1(F.rms_norm(x, (8,)))))
    return x + 0.5 * F.dropout(y, 0.1, False)


def clamped(m: Any, x: Tensor) -> Tensor:
    return m.fc2(m.fc1(x).clamp(0, 6))


def guarded(m: Any, x: Tensor) -> Tensor:
    return m.fc2(m.fc1(x).clamp(-6e4, 6e4))


def projected(m: Any, x: Tensor) -> Tensor:
    return m.fc2(F.normalize(m.fc1(x), dim=-1))


def siamese(m: Any, x: Tensor) -> Tensor:
    return m.fc2((m.fc1(x) - m.fc1(x.flip(1))).abs())


def at_positions(m: Any, x: Tensor) -> Tensor:
    return m.fc2(m.fc1(x) * torch.cos(torch.arange(32.0)))


def convolved(m: Any, x: Tensor) -> Tensor:
    y = m.fc1(x).mT
    per_channel = torch.ones(32, 1, 3)
    return x + m.fc2(F.gelu(F.conv1d(y, per_channel, padding=1, groups=32)).mT)


def excited(m: Any, x: Tensor) -> Tensor:
    return x + squeeze_excite(m, x)


def hard_excited(m: Any, x: Tensor) -> Tensor:
    y = m.fc2(torch.relu(m.fc1(x.mean(1, keepdim=True))))
    return x + x * ((y + 3).clamp(0, 6) / 6)


def of_context(m: Any, x: Tensor) -> Tensor:
    return x + m.fc2(torch.relu(m.fc1(x.mean(1, keepdim=True))))


def stacked(m: Any, x: Tensor) -> Tensor:
    return m.fc2(F.gelu(m.fc1(x)))


def swiglu(m: Any, x: Tensor) -> Tensor:
    return m.w2(F.silu(m.w1(x)) * m.w3(x))


def quick(m: Any, x: Tensor) -> Tensor:
    y = m.wi(x)
    return m.wo(y * torch.sigmoid(1.702 * y))


def gated(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def mixture(m: Any, x: Tensor) -> Tensor:
    weights, chosen = m.gate(x).softmax(-1).topk(2)
    return x * weights.sum(-1, keepdim=True) + chosen.sum(-1, keepdim=True)


def attention(m: Any, x: Tensor) -> Tensor:
    return m.wo(F.scaled_dot_product_attention(m.wq(x), m.wk(x), m.wv(x)))


NAMES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, tuple[int, int]], str]] = {
    "an equivariant net's wv and o": (equivariant, {"wv": (8, 8), "o": (8, 8)}, ". ."),
    "a squeeze and excitation": (squeeze_excite, {"fc1": (2, 8), "fc2": (8, 2)}, ". ."),
    "an excitation beside a sum": (excited, {"fc1": (2, 8), "fc2": (8, 2)}, ". ."),
    "one with a hard sigmoid": (hard_excited, {"fc1": (2, 8), "fc2": (8, 2)}, ". ."),
    "a block": (block, {"fc1": (32, 8), "fc2": (8, 32)}, "up down"),
    "a block that is narrower": (block, {"fc1": (4, 8), "fc2": (8, 4)}, "up down"),
    "one as wide, in a sum with a norm": (normed, {"fc1": (8, 8), "fc2": (8, 8)}, "up down"),
    "narrower layers without a sum": (stacked, {"fc1": (4, 8), "fc2": (8, 4)}, ". ."),
    "a sum that repeats a mean": (of_context, {"fc1": (2, 8), "fc2": (8, 2)}, ". ."),
    "a clamp": (clamped, {"fc1": (32, 8), "fc2": (8, 32)}, "up down"),
    "a guard of float16": (guarded, {"fc1": (32, 8), "fc2": (8, 32)}, ". ."),
    "a normalised layer": (projected, {"fc1": (32, 8), "fc2": (8, 32)}, ". ."),
    "a difference": (siamese, {"fc1": (32, 8), "fc2": (8, 32)}, ". ."),
    "a product with positions": (at_positions, {"fc1": (32, 8), "fc2": (8, 32)}, ". ."),
    "a depthwise convolution": (convolved, {"fc1": (32, 8), "fc2": (8, 32)}, "up down"),
    "a gated block, narrower": (swiglu, dict.fromkeys(("w1", "w3"), (4, 8)) | {"w2": (8, 4)},
                                "gate up down"),
    "an activation that multiplies": (quick, {"wi": (32, 8), "wo": (8, 32)}, "up down"),
    "a gate that is no router": (
        gated, dict.fromkeys(("gate", "up"), (16, 8)) | {"down": (8, 16)}, "gate . ."
    ),
    "a router": (mixture, {"gate": (4, 8)}, "router"),
    "attention": (attention, dict.fromkeys(("wq", "wk", "wv", "wo"), (8, 8)), "q k v o"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_role_where_the_data_flow_agrees(name: str) -> None:
    run, widths, roles = NAMES[name]
    found = lora_fx.find(Layers(run, **widths).eval(), (X,))
    assert [t.role or "." for t in (*found.targets, *found.optional)] == roles.split()
