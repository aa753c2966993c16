"""GELU by its tanh formula on the CPU.

½·x·(1 + tanh(z/2)) = x·σ(z) with z = √(8/π)·(x + .044715·x³).

Torch's own takes 1.3 ns a number in forward and again in backward, most of it for the tanh. σ
takes a fifth of that, and x·σ(z) half; the slope, σ(z) + x·z'·σ(z)·(1 − σ(z)) with
x·z' = 3·z − 2·√(8/π)·x, needs no σ of its own where both are computed together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

aten = torch.ops.aten

ROOT = math.sqrt(8 / math.pi)
PIECE = 1 << 17
"""The elements per thread and step, few enough for intermediate results to stay in a cache."""


def gelu_tanh(x: torch.Tensor, dy: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Return (y,), the GELU of x; with dy = ∂L/∂y, return (y, ∂L/∂x).

    Both are computed in 32 bits and rounded once.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or type(x) is not torch.Tensor:
        return _as_torch_computes(x, dy)

    piece = PIECE * torch.get_num_threads()
    root = torch.tensor(ROOT)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dy is None:
        for x_piece, y_piece in _pieces(piece, x, y):
            v = x_piece.float()
            y_piece.copy_(v * torch.sigmoid(_z(v, root)))
        return (y,)

    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    for x_piece, y_piece, dy_piece, dx_piece in _pieces(piece, x, y, dy, dx):
        v = x_piece.float()
        z = _z(v, root)
        sigma = torch.sigmoid(z)
        y_piece.copy_(v * sigma)

        # x·z' / 3 = z − ⅔·√(8/π)·x, in the memory of z
        third_of_x_dz = z.sub_(v, alpha=2 / 3 * ROOT)
        # third_of_x_dz · σ·(1 − σ), in the same memory
        correction = aten.sigmoid_backward.grad_input(third_of_x_dz, sigma, grad_input=z)
        slope = sigma.add_(correction, alpha=3)
        dx_piece.copy_(slope.mul_(dy_piece.float()))
    return y, dx


def _as_torch_computes(x: torch.Tensor, dy: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    y = aten.gelu.default(x, approximate="tanh")
    if dy is None:
        return (y,)
    return y, aten.gelu_backward.default(dy, x, approximate="tanh")


def _pieces(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield pieces of tensors of one shape, with at most `size` elements of each."""
    flat = [torch.split(tensor.reshape(-1), size) for tensor in tensors]
    return zip(*flat, strict=True)


def _z(x: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Return z = √(8/π)·(x + .044715·x³)."""
    z = torch.addcmul(root, x, x, value=0.044715 * ROOT).mul_(x)
    # σ is 0 or 1 long before; where x³ overflows, ∞·0 would be no slope
    return z.clamp_(-1e4, 1e4)
