"""Gradients that the exporter lacks or translates wrongly, computed by other operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_fx.fx.lowering.decomposition import Table
from lora_fx.fx.operators import decomposition_table

aten = torch.ops.aten


def nll_loss(x: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Return the loss of labels, and the number of labels that count.

    The exporter's own forgets how many, so that a mean has the gradient of a sum. ONNX counts an
    index below 0 from the end, where torch refuses it: it becomes one that ONNX refuses too.
    """
    ignored = options[2]
    refused = (target < 0) & (target != ignored)
    target = torch.where(refused, x.shape[-1], target)
    loss: Any = decomposition_table[aten.nll_loss_forward.default]
    return loss(x, target, *options)  # type: ignore[no-any-return]


def convolution_backward(
    dy: Tensor, x: Tensor, w: Tensor, _: object, *attributes: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients (∂x, ∂w, ∂bias) of any convolution, computed by convolutions.

    ∂x is the other kind of convolution of ∂y. ∂w is one in which the batch is summed over as
    channels are, stride and dilation trading places; each group of channels is a group.
    """
    *_, needed = attributes
    dx = _gradient_of_x(dy, x, w, *attributes) if needed[0] else None
    dw = _gradient_of_w(dy, x, w, *attributes) if needed[1] else None
    db = None
    if needed[2]:
        db = dy.sum([0, *range(2, x.dim())])
    return dx, dw, db


def _gradient_of_x(dy: Tensor, x: Tensor, w: Tensor, *attributes: Any) -> Tensor:
    stride, padding, dilation, transposed, _, groups, _ = attributes
    # a stride may leave that many elements over at the end; an attribute takes no free size
    left_over = [0 if transposed else step - 1 for step in stride]
    dx: Tensor = aten.convolution(
        dy, w, None, stride, padding, dilation, not transposed, left_over, groups
    )
    for axis, most in enumerate(left_over, 2):
        if most:
            dx = dx.narrow(axis, 0, x.shape[axis])
    return dx


def _gradient_of_w(dy: Tensor, x: Tensor, w: Tensor, *attributes: Any) -> Tensor:
    stride, padding, dilation, transposed, _, groups, _ = attributes
    axes = range(x.dim() - 2)
    wide, slides = (dy, x) if transposed else (x, dy)
    by_group = wide.reshape(wide.shape[0], groups, -1, *wide.shape[2:])
    rows = by_group.permute(2, 1, 0, *(axis + 3 for axis in axes)).flatten(1, 2)
    filters = slides.transpose(0, 1)
    no_padding = [0 for _ in axes]
    dw: Tensor = aten.convolution(
        rows, filters, None, dilation, padding, stride, False, no_padding, groups
    )
    for axis in axes:
        dw = dw.narrow(axis + 2, 0, w.shape[axis + 2])
    return dw.transpose(0, 1)


def average_backward(
    dy: Tensor,
    x: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool,
    counted: bool,
    divisor: int | None,
) -> Tensor:
    """Return the gradient of an average pool: each window gives its share to all its elements."""
    stride = stride or kernel
    ones = torch.ones((1, 1, *kernel), device=x.device)
    places = torch.ones((1, 1, *x.shape[-2:]), device=x.device)
    above, left = padding
    places = torch.constant_pad_nd(places, [left, left, above, above], float(counted))

    # with ceil the last window ends after the padding, and what lies there never counts
    over = []
    for axis in range(2):
        windows = dy.shape[axis - 2]
        end = (windows - 1) * stride[axis] + kernel[axis]
        over.append(end - places.shape[axis - 2])
    left_over = [step - 1 for step in stride]
    places = torch.constant_pad_nd(places, [0, over[1], 0, over[0]])
    counts = aten.convolution(places, ones, None, stride, [0, 0], [1, 1], False, [0, 0], 1)

    share = dy / (divisor or counts)
    planes = share.reshape(-1, 1, *dy.shape[-2:])
    gradient: Tensor = aten.convolution(
        planes, ones, None, stride, padding, [1, 1], True, left_over, 1
    )
    return gradient[..., : x.shape[-2], : x.shape[-1]].reshape(x.shape)


OWN: Table = {
    aten.nll_loss_forward.default: nll_loss,
    aten.convolution_backward.default: convolution_backward,
    aten.avg_pool2d_backward.default: average_backward,
}
"""The decompositions of gradient operators that the exporter lacks or translates wrongly."""
