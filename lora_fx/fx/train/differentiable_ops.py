"""Operators whose gradient the exporter has no operator for, by others that autograd can follow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.fx.graph.nodes import aten_ops
from lora_fx.fx.lowering.decomposition import Table
from lora_fx.fx.operators import decomposition_table

aten = torch.ops.aten


def product(x: Tensor, dim: int | None = None, keepdim: bool = False, **_: object) -> Tensor:
    """The product of a dimension, or of all, by halves."""
    if dim is None:
        x, dim = x.flatten(), 0
    x = x.movedim(dim, 0)
    while len(x) > 1:
        half = len(x) // 2
        x = torch.cat([x[:half] * x[half : 2 * half], x[2 * half :]])
    return x.movedim(0, dim) if keepdim else x[0]


def products(x: Tensor, dim: int, **_: object) -> Tensor:
    """The products of all elements up to each, by doubling how far they reach."""
    x, reach = x.movedim(dim, 0), 1
    while reach < len(x):
        x = torch.cat([x[:reach], x[reach:] * x[:-reach]])
        reach *= 2
    return x.movedim(0, dim)


def bags(
    w: Tensor, places: Tensor, starts: Tensor, _: bool = False, mode: int = 0, *more: Any
) -> tuple[Tensor, None, None, None]:
    """The sums, means or maxima of the rows of bags: each from where it starts to the next."""
    rest: list[Any] = [*more[1:], *(None, False, None)[len(more[1:]) :]]
    weights, ends, left_out = rest
    starts = starts[:-1] if ends else starts
    after = torch.arange(places.shape[0], device=w.device) >= starts[:, None]
    inside = after & ~F.pad(after[1:], [0, 0, 0, 1])
    if left_out is not None:
        inside = inside & (places != left_out)
    rows = F.embedding(places, w)
    if weights is not None:
        rows = rows * weights[:, None]
    if mode == 2:
        held = inside.any(1, keepdim=True)
        top = torch.where(inside[..., None], rows, -torch.inf).amax(1)
        return torch.where(held, top, 0.0), None, None, None
    share = inside.to(w.dtype)
    if mode == 1:
        share = share / share.sum(1, keepdim=True).clamp(min=1)
    return share @ rows, None, None, None


def adaptive_maxima(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, None]:
    """The maxima of as many windows as asked for, one axis after the other; no places."""
    return _by_axes(lambda part, axis: part.max(axis)[0], x, sizes), None


def _by_axes(reduce: Callable[[Tensor, int], Tensor], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """What as many windows as asked for come to, one axis after the other."""
    for axis, n in enumerate(sizes, x.dim() - len(sizes)):
        bounds = [(i * x.shape[axis] // n, -(-(i + 1) * x.shape[axis] // n)) for i in range(n)]
        x = torch.stack([reduce(x.narrow(axis, lo, hi - lo), axis) for lo, hi in bounds], axis)
    return x


def pooled(
    pool: Callable[..., Tensor], x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0,), *more: Any,
) -> Tensor:  # fmt: skip
    """Windows of three axes as those of two, and then of the third.

    `more` is what the pool of two axes takes: the dilation of a maximum goes by axes as well, and
    a divisor is one of the whole window.
    """
    k, s, p = ([*v] * (3 // len(v)) for v in (kernel, stride or kernel, padding))
    dilated = pool is F.max_pool2d and bool(more)
    d = [*more[0]] * (3 // len(more[0])) if dilated else []
    divisor = None if dilated or len(more) < 3 else more[2]
    rest = [*more[dilated:2], *([1] if divisor else [])]
    planes = pool(x.flatten(-4, -3), k[1:], s[1:], p[1:], *([d[1:]] if d else []), *rest)
    columns = planes.reshape(*x.shape[:-2], -1)
    made = pool(columns, [k[0], 1], [s[0], 1], [p[0], 0], *([[d[0], 1]] if d else []), *rest)
    made = made.reshape(*made.shape[:-1], *planes.shape[-2:])
    return made / divisor if divisor else made


def samples(x: Tensor, *how: Any) -> Tensor:
    """The samples of planes; those of volumes stay one operator."""
    planes: Any = decomposition_table[aten.grid_sampler_2d.default]
    return (planes if x.dim() == 4 else aten.grid_sampler)(x, *how)  # type: ignore[no-any-return]


def distances(a: Tensor, b: Tensor, p: float = 2.0, _: int | None = None) -> Tensor:
    """The distance of every row of a from every row of b; its gradient at 0 is 0."""
    norm: Callable[..., Tensor] = torch.linalg.vector_norm
    return norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


def scattered(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The elements of the source, in their order, at the places of the mask."""
    x, mask = torch.broadcast_tensors(x, mask)  # type: ignore[no-untyped-call]
    before = mask.flatten().cumsum(0).reshape(x.shape) - 1
    return torch.where(mask, source.flatten()[before.clamp(min=0)], x)


def windows(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Tensor.unfold by int64 places: torch's gradient has int32, which ScatterND does not take."""
    starts = torch.arange(0, x.shape[dim] - size + 1, step, device=x.device)
    places = starts[:, None] + torch.arange(size, device=x.device)
    return x.movedim(dim, -1)[..., places].movedim(-2, dim % x.dim())


DIFFERENTIABLE: Table = {
    aten.adaptive_avg_pool1d.default: functools.partial(_by_axes, torch.mean),
    aten.adaptive_avg_pool3d.default: functools.partial(_by_axes, torch.mean),
    **{getattr(aten, f"adaptive_max_pool{d}d").default: adaptive_maxima for d in (1, 2, 3)},
    aten.adaptive_avg_pool2d.default: decomposition_table[aten._adaptive_avg_pool2d.default],
    aten.avg_pool3d.default: functools.partial(pooled, F.avg_pool2d),
    aten.max_pool3d.default: functools.partial(pooled, F.max_pool2d),
    aten.grid_sampler.default: samples,
    aten.cdist.default: distances,
    aten.masked_scatter.default: scattered,
    aten.unfold.default: windows,
    aten.cumprod.default: products,
    **dict.fromkeys(aten_ops("prod prod.dim_int"), product),
    **dict.fromkeys(aten_ops("embedding_bag embedding_bag.padding_idx"), bags),
}
"""What comes apart before autograd sees it: its gradient is an operator that never does."""
