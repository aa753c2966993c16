"""Gradients of a recomputed region by a formula, in place of autograd through its steps.

formula(*values) returns (x,), and formula(*values, dx=∂L/∂x) returns x and the gradients of the
first values. The results are those of the steps; autograd would build a graph of the steps in every
backward pass, and walk it.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten


def gated_silu(
    gate: torch.Tensor, up: torch.Tensor, dx: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Return (x,) with x = silu(gate)·up, or (x, ∂L/∂gate, ∂L/∂up) given ∂L/∂x.

    The numbers are those of autograd, bit for bit: it computes the same products.
    """
    activated = aten.silu.default(gate)
    x = activated * up
    if dx is None:
        return (x,)
    d_gate = aten.silu_backward.default(dx * up, gate)
    return x, d_gate, dx * activated


def rms_norm(
    v: torch.Tensor, weight: torch.Tensor, dx: torch.Tensor | None = None, *, eps: float
) -> tuple[torch.Tensor, ...]:
    """Return (x,) with x = weight·(v·r), or (x, ∂L/∂v) given ∂L/∂x, for v in 16 bits.

    r = 1/√(mean(v²) + eps) over the last axis, and v·r is rounded to 16 bits before the product
    with the frozen weight, as transformers writes the norm. With e = weight·∂L/∂x,

        ∂L/∂v = r·e − v·r³·mean(e·v)

    in 32 bits, rounded once. Autograd takes three times as many passes over memory.
    """
    wide = v.float()
    r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    x = weight * (wide * r).to(v.dtype)
    if dx is None:
        return (x,)
    e = (weight * dx).float()
    towards_v = (e * wide).mean(-1, keepdim=True).mul_(r.pow(3))
    return x, e.mul_(r).addcmul_(wide, towards_v, value=-1).to(v.dtype)
