"""Gradients that the exporter has no operator for, or a wrong one, by others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_fx.fx.lowering.decomposition import Table
from lora_fx.fx.operators import decomposition_table

aten = torch.ops.aten


def nll_loss(x: Tensor, target: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    """The loss of labels, and how many count.

    The exporter's own forgets how many, so that a mean has the gradient of a sum. ONNX counts an
    index below 0 from the end, where torch refuses it: it becomes one that ONNX refuses too.
    """
    ignored = more[2]
    wrong = (target < 0) & (target != ignored)
    apart: Any = decomposition_table[aten.nll_loss_forward.default]
    return apart(x, torch.where(wrong, x.shape[-1], target), *more)  # type: ignore[no-any-return]


def convolution_backward(
    dy: Tensor, x: Tensor, w: Tensor, _: object, *attributes: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a convolution of any kind by convolutions: (∂x, ∂w, ∂bias).

    ∂x is the other kind of convolution of ∂y. ∂w is one in which the batch is summed over as
    channels are, stride and dilation trading places; each group of channels is a group.
    """
    stride, padding, dilation, transposed, _, groups, wanted = attributes
    axes = range(x.dim() - 2)
    dx = dw = db = None
    if wanted[0]:
        rest = [0 for _ in axes]
        if not transposed:  # what the strides left over at the end
            reach = [dilation[i] * (w.shape[i + 2] - 1) + 1 - 2 * padding[i] for i in axes]
            rest = [(x.shape[i + 2] - reach[i]) % stride[i] for i in axes]
        dx = aten.convolution(dy, w, None, stride, padding, dilation, not transposed, rest, groups)
    if wanted[1]:
        wide, slides = (dy, x) if transposed else (x, dy)
        size = wide.shape[2:]
        parts = wide.reshape(wide.shape[0], groups, -1, *size)
        rows = parts.permute(2, 1, 0, *(i + 3 for i in axes)).flatten(1, 2)
        filters = slides.transpose(0, 1)
        none = [0 for _ in axes]
        dw = aten.convolution(rows, filters, None, dilation, padding, stride, False, none, groups)
        for i in axes:
            dw = dw.narrow(i + 2, 0, w.shape[i + 2])
        dw = dw.transpose(0, 1)
    if wanted[2]:
        db = dy.sum([0, *(i + 2 for i in axes)])
    return dx, dw, db


def average_backward(
    dy: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, ceil: bool, counted: bool,
    divisor: int | None,
) -> Tensor:  # fmt: skip
    """The gradient of an average over windows: each gives its share to every place of it."""
    stride = stride or kernel
    ones = torch.ones((1, 1, *kernel), device=x.device)
    places = torch.ones((1, 1, *x.shape[-2:]), device=x.device)
    above, left = padding
    places = torch.constant_pad_nd(places, [left, left, above, above], float(counted))
    # with ceil the last window ends after the padding, and what lies there never counts
    over = [(dy.shape[i - 2] - 1) * stride[i] + kernel[i] - places.shape[i - 2] for i in range(2)]
    rest = [max(-o, 0) if ceil else -o for o in over]
    places = torch.constant_pad_nd(places, [0, over[1], 0, over[0]])
    held = aten.convolution(places, ones, None, stride, [0, 0], [1, 1], False, [0, 0], 1)
    share = dy / (divisor or held)
    planes = share.reshape(-1, 1, *dy.shape[-2:])
    made: Tensor = aten.convolution(planes, ones, None, stride, padding, [1, 1], True, rest, 1)
    return made[..., : x.shape[-2], : x.shape[-1]].reshape(x.shape)


OWN: Table = {
    aten.nll_loss_forward.default: nll_loss,
    aten.convolution_backward.default: convolution_backward,
    aten.avg_pool2d_backward.default: average_backward,
}
"""What comes apart before the exporter sees it: it has no such operator, or a wrong one."""
