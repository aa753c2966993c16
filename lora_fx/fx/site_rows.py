"""x and dy of a use as rows: [*batch, rows, in] and [*batch, rows, out] in the axes of its Kind.

With these rows ∂L/∂W = Σ dy xᵀ, whatever the op: a convolution's x is cut into its windows, a
transposed one's dy; the rows of a grouped op are padded with zeros to the largest group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fx.fx.tensors import padding
from lora_fx.ir import convolution, einsum, kinds
from lora_fx.ir.graph import Site
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Gather


@dataclass(frozen=True)
class SiteRows:
    """Rows of a batch.

    Attributes:
        value: [*batch, rows, side]; [rows] ids where x is one-hot.
        count: Without those that are padding.
        one_hot: The number of ids; 0 where the rows are there themselves.
        lead: The sizes that rows were made of; empty where they were moved or cut.
    """

    value: Tensor
    count: int
    one_hot: int = 0
    lead: tuple[int, ...] = ()

    def kept(self, mask: Tensor) -> SiteRows:
        """Without the rows that a mask [examples, positions] leaves out, if it is one of these."""
        shapes = (tuple(mask.shape), (mask.numel(),))
        if self.lead not in shapes or self.value.dim() > 2:
            return self
        value = self.value[mask.reshape(-1) != 0]
        return SiteRows(value, len(value), self.one_hot, self.lead)


DOTS = "ABCDEFGH"


def readable(site: Site) -> bool:
    """True when a use's x and dy can be had as rows; else only its gradient can."""
    if any(isinstance(step, Gather) for step in site.view.steps):
        return False
    return isinstance(
        site.kind,
        (
            einsum.Einsum,
            kinds.Embedding,
            kinds.Grouped,
            convolution.Conv,
            convolution.ConvTranspose,
        ),
    )


def rows_of(
    site: Site, t: Tensor, ends: Tensor | None, x: Sequence[int] | None = None
) -> SiteRows | None:
    """The rows of a use's x, or of its dy, in the same order; None where sizes are broadcast.

    Args:
        site: The use.
        t: Its activation x, or dy.
        ends: The ends of the groups, of a grouped op.
        x: The shape of x, where t is dy.
    """
    kind = site.kind
    is_dy = x is not None
    if isinstance(kind, kinds.Embedding):
        return _embedding(site, t, is_dy)
    if isinstance(kind, einsum.Einsum):
        axes = kind.axes(site.operand)
        if is_dy:
            return _einsum(site, t, kind.y, axes.out)
        return _einsum(site, t, kind.x, axes.in_)
    if isinstance(kind, kinds.Grouped):
        return _grouped(t, ends)
    assert isinstance(kind, convolution.Conv | convolution.ConvTranspose)
    if t.dim() != len(site.operand):
        t = t.unsqueeze(0)  # torch's can go without examples
    spans_kernel = is_dy == isinstance(kind, convolution.ConvTranspose)
    if spans_kernel:
        spots = () if x is None else x[2 - len(site.operand) :]
        t = _windows(site, t, spots)
    return _channels(kind.groups, t, site)


def _embedding(site: Site, t: Tensor, is_dy: bool) -> SiteRows:
    """The ids of a lookup, or the rows of its dy."""
    if is_dy:
        rows = t.reshape(-1, math.prod(site.operand[1:]))
        return SiteRows(rows, len(rows))
    ids = t.reshape(-1)
    return SiteRows(ids, len(ids), site.operand[0], t.shape)


def rows_of_part(
    rows: Tensor, read: Layout, start: Sequence[int], own: Layout, *, out: bool
) -> Tensor:
    """The rows of a part of the tensor that a use reads.

    Args:
        rows: [*batch, rows, side] of the use.
        read: The Layout of the use.
        start: Where the part begins, per axis of `read.shape`.
        own: The Layout of the part.
        out: Whether the side is out, else in.
    """
    if own == read:
        return rows
    side = read.out if out else read.in_
    size = own.out_size if out else own.in_size
    count = rows.shape[-2]

    batch_sizes = [read.shape[axis] for axis in read.batch]
    side_sizes = [read.shape[axis] for axis in side]
    split = rows.reshape(*batch_sizes, count, *side_sizes)

    def region(axis: int) -> slice:
        return slice(start[axis], start[axis] + own.shape[axis])

    index = [*map(region, read.batch), slice(None), *map(region, side)]
    return split[tuple(index)].reshape(*own.batch_shape, count, size)


def _einsum(site: Site, t: Tensor, term: str, side: Sequence[int]) -> SiteRows | None:
    kind = site.kind
    assert isinstance(kind, einsum.Einsum)
    batch = kind.axes(site.operand).batch
    ellipsis_rank = t.dim() - len(term.replace("...", ""))
    letters = term.replace("...", DOTS[:ellipsis_rank])

    batch_axes = [letters.index(kind.w[axis]) for axis in batch]
    side_axes = [letters.index(kind.w[axis]) for axis in side]
    weight_axes = [*batch_axes, *side_axes]
    sizes = [site.operand[axis] for axis in (*batch, *side)]
    if [t.shape[axis] for axis in weight_axes] != sizes:
        return None

    row_axes = [axis for axis in range(t.dim()) if axis not in weight_axes]
    moved = t.permute(*batch_axes, *row_axes, *side_axes)
    batch_sizes = [site.operand[axis] for axis in batch]
    flat = moved.reshape(*batch_sizes, -1, math.prod(site.operand[axis] for axis in side))
    return SiteRows(flat, flat.shape[-2], lead=tuple(t.shape[axis] for axis in row_axes))


def _grouped(t: Tensor, ends: Tensor | None) -> SiteRows:
    """Rows sorted by group as [groups, largest, side]; `ends` are the groups' last rows + 1."""
    assert ends is not None
    stops = ends.tolist()
    groups = [t[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
    return SiteRows(torch.nn.utils.rnn.pad_sequence(groups, batch_first=True), len(t))


def _channels(groups: int, t: Tensor, site: Site) -> SiteRows:
    """[n, g·c, *spots, *taps] → [g, n·∏spots, c·∏taps]; taps are there after _windows."""
    dims = len(site.operand) - 2
    count = t.shape[0]
    spots = t.shape[2 : 2 + dims]
    taps = t.shape[2 + dims :]
    split = t.reshape(count, groups, -1, *spots, *taps)
    first_tap = 3 + dims
    spot_axes = range(3, first_tap)
    tap_axes = range(first_tap, first_tap + len(taps))
    moved = split.permute(1, 0, *spot_axes, 2, *tap_axes)
    flat = moved.reshape(groups, count * math.prod(spots), -1)
    return SiteRows(flat[0] if groups == 1 else flat, flat.shape[1])


def _windows(site: Site, t: Tensor, spots: Sequence[int] = ()) -> Tensor:
    """[n, c, *size] → [n, c, *spots, *kernel]; `spots`: as many windows, whatever the size."""
    kernel = site.operand[2:]
    stride = _an_axis(site.attrs["stride"], len(kernel))
    dilation = _an_axis(site.attrs["dilation"], len(kernel))
    reach = [d * (size - 1) + 1 for d, size in zip(dilation, kernel, strict=True)]

    before, after = _padding_of(site.attrs["padding"], reach)
    if spots:  # of a transposed convolution: a window for every element of its x
        for axis, count in enumerate(spots):
            available = t.shape[2 + axis] + before[axis]
            needed = (count - 1) * stride[axis] + reach[axis]
            after[axis] = max(0, needed - available)

    t = torch.nn.functional.pad(t, padding(before, after))
    for axis in range(len(kernel)):
        t = t.unfold(2 + axis, reach[axis], stride[axis])
        t = t[..., :: dilation[axis]]
        if spots:
            t = t.narrow(2 + axis, 0, spots[axis])
    return t


def _an_axis(values: Sequence[int], axes: int) -> list[int]:
    """A number for every axis; a single number is used for every axis."""
    return [*values] * (axes // len(values))


def _padding_of(attribute: Any, reach: Sequence[int]) -> tuple[list[int], list[int]]:
    """The zeros before and behind each axis, by a convolution's attribute."""
    if attribute == "same":
        before = [(size - 1) // 2 for size in reach]
        after = [size - 1 - first for size, first in zip(reach, before, strict=True)]
        return before, after
    if attribute == "valid":
        return [0] * len(reach), [0] * len(reach)
    zeros = _an_axis(attribute, len(reach))
    return zeros, list(zeros)
