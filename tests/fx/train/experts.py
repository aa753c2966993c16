"""A block of stacked experts, and what it makes in fp64 by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STACKS = ("experts.gate_up_proj", "experts.down_proj")


def block(implementation: str, width: int, inner: int, experts: int) -> nn.Module:
    """Mixtral's router and experts, two of which every token goes to."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_local_experts=experts,
        num_experts_per_tok=2,
        experts_implementation=implementation,
    )
    torch.manual_seed(0)
    made: nn.Module = MixtralSparseMoeBlock(config)
    for p in made.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return made


def by_hand(base: Any, x: Tensor, factors: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """The block in fp64 with W_e + s·B_e·A_e for each expert e, looked up one token at a time.

    Args:
        base: The block.
        x: [rows, tokens, width].
        factors: A [experts, rank, in] and B [experts, out, rank] of the two stacks.
        scale: s.
    """
    flat = x.reshape(-1, x.shape[-1])
    chosen = base.gate(flat.to(base.gate.weight.dtype))[2]
    shares = F.softmax(flat @ base.gate.weight.double().t(), -1).gather(1, chosen)
    shares = shares / shares.sum(-1, keepdim=True)
    up, down = (
        getattr(base.experts, name.split(".")[1]).double() + scale * (b @ a)
        for name, (a, b) in zip(STACKS, factors, strict=True)
    )
    rows = []
    for token, picks, weights in zip(flat, chosen.tolist(), shares, strict=True):
        made = []
        for e, share in zip(picks, weights, strict=True):
            gate, value = (up[e] @ token).chunk(2)
            made.append(share * (down[e] @ (F.silu(gate) * value)))
        rows.append(sum(made))
    return torch.stack(rows).view(x.shape)
