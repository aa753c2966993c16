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
        x = x.flatten()
        dim = 0
    x = x.movedim(dim, 0)
    while len(x) > 1:
        half = len(x) // 2
        x = torch.cat([x[:half] * x[half : 2 * half], x[2 * half :]])
    return x.movedim(0, dim) if keepdim else x[0]


def products(x: Tensor, dim: int, **_: object) -> Tensor:
    """The products of all elements up to each, by doubling how far they reach."""
    x = x.movedim(dim, 0)
    reach = 1
    while reach < len(x):
        x = torch.cat([x[:reach], x[reach:] * x[:-reach]])
        reach *= 2
    return x.movedim(0, dim)


def bags(
    w: Tensor, ids: Tensor, starts: Tensor, _: bool = False, mode: int = 0, *options: Any
) -> tuple[Tensor, None, None, None]:
    """The sums, means or maxima of the rows of bags; a bag ends where the next one starts.

    The options are aten's: sparse, per_sample_weights, include_last_offset, padding_idx.
    """
    defaults: list[Any] = [None, False, None]
    set_options = list(options[1:])
    weights, has_end, padding_idx = set_options + defaults[len(set_options) :]
    if has_end:
        starts = starts[:-1]
    after_start = torch.arange(ids.shape[0], device=w.device) >= starts[:, None]
    inside = after_start & ~F.pad(after_start[1:], [0, 0, 0, 1])
    if padding_idx is not None:
        inside = inside & (ids != padding_idx)
    rows = F.embedding(ids, w)
    if weights is not None:
        rows = rows * weights[:, None]
    if mode == 2:
        has_rows = inside.any(1, keepdim=True)
        top = torch.where(inside[..., None], rows, -torch.inf).amax(1)
        return torch.where(has_rows, top, 0.0), None, None, None
    share = inside.to(w.dtype)
    if mode == 1:
        share = share / share.sum(1, keepdim=True).clamp(min=1)
    return share @ rows, None, None, None


def adaptive_maxima(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, None]:
    """The maxima of the given number of windows, one axis after the other; no indices."""
    return _by_axes(lambda part, axis: part.max(axis)[0], x, sizes), None


def _by_axes(reduce: Callable[[Tensor, int], Tensor], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Reduce the number of windows in `sizes`, one axis after the other."""
    for axis, count in enumerate(sizes, x.dim() - len(sizes)):
        length = x.shape[axis]
        windows = []
        for i in range(count):
            start = i * length // count
            stop = -(-(i + 1) * length // count)
            windows.append(reduce(x.narrow(axis, start, stop - start), axis))
        x = torch.stack(windows, axis)
    return x


def pooled(
    pool: Callable[..., Tensor],
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    *options: Any,
) -> Tensor:
    """Pool windows of three axes as windows of two, and then of the third.

    The options are what the pool of two axes takes: the dilation of a maximum goes by axes as well,
    and a divisor is one of the whole window.
    """
    kernel = _three(kernel)
    stride = _three(stride or kernel)
    padding = _three(padding)
    dilations: tuple[list[list[int]], list[list[int]]] = ([], [])
    divisor = None
    if pool is F.max_pool2d and options:
        dilation = _three(options[0])
        dilations = ([dilation[1:]], [[dilation[0], 1]])
        others = list(options[1:2])
    else:
        divisor = options[2] if len(options) > 2 else None
        others = list(options[:2])
    if divisor:
        others.append(1)

    planes = pool(x.flatten(-4, -3), kernel[1:], stride[1:], padding[1:], *dilations[0], *others)
    columns = planes.reshape(*x.shape[:-2], -1)
    volumes = pool(columns, [kernel[0], 1], [stride[0], 1], [padding[0], 0], *dilations[1], *others)
    volumes = volumes.reshape(*volumes.shape[:-1], *planes.shape[-2:])
    return volumes / divisor if divisor else volumes


def _three(values: Sequence[int]) -> list[int]:
    """A number for each of three axes; a single number is used for all."""
    return [*values] * (3 // len(values))


def samples(x: Tensor, *options: Any) -> Tensor:
    """The samples of planes; samples of volumes stay one operator."""
    sample: Any = aten.grid_sampler
    if x.dim() == 4:
        sample = decomposition_table[aten.grid_sampler_2d.default]
    return sample(x, *options)  # type: ignore[no-any-return]


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


_means_by_axes = functools.partial(_by_axes, torch.mean)
DIFFERENTIABLE: Table = {
    aten.adaptive_avg_pool1d.default: _means_by_axes,
    aten.adaptive_avg_pool3d.default: _means_by_axes,
    aten.adaptive_max_pool1d.default: adaptive_maxima,
    aten.adaptive_max_pool2d.default: adaptive_maxima,
    aten.adaptive_max_pool3d.default: adaptive_maxima,
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
"""Operator → its decomposition for autograd, since its gradient has no decomposition."""
