"""The emitter that computes with numpy at once: it does fold, and is every test's reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.graph import Role, Site


def conv(
    x: Array,
    w: Array,
    stride: tuple[int, ...] = (1,),
    padding: tuple[int, ...] | str = (0,),
    dilation: tuple[int, ...] = (1,),
    groups: int = 1,
) -> Array:
    """Cross-correlation of x [n, g·in, *size] with w [g·out, in, *kernel], by definition.

    `padding` is a width per side and axis, or valid / same (as torch: the odd one goes last).
    """
    k = w.shape[2:]
    n = len(k)
    stride, dilation = (tuple(v) * n if len(v) == 1 else tuple(v) for v in (stride, dilation))
    reach = [d * (s - 1) for d, s in zip(dilation, k, strict=True)]
    if padding == "same":
        pads = [(r // 2, r - r // 2) for r in reach]
    elif padding == "valid":
        pads = [(0, 0)] * n
    else:
        width = [int(p) for p in padding]
        pads = [(p, p) for p in (width * n if len(width) == 1 else width)]
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    axes = tuple(range(2, 2 + n))
    windows = np.lib.stride_tricks.sliding_window_view(x, [r + 1 for r in reach], axes)
    every = slice(None)
    steps = (every, every, *(slice(None, None, s) for s in stride))
    windows = windows[steps + tuple(slice(None, None, d) for d in dilation)]
    spots = windows.shape[2 : 2 + n]
    grouped = windows.reshape(x.shape[0], groups, -1, *spots, *k)
    kernel = w.reshape(groups, -1, *w.shape[1:])
    space, taps = "hwd"[:n], "klm"[:n]
    y = np.einsum(f"ngi{space}{taps},goi{taps}->ngo{space}", grouped, kernel)
    return np.asarray(y.reshape(x.shape[0], -1, *spots))


def conv_transpose(
    x: Array,
    w: Array,
    stride: tuple[int, ...] = (1,),
    padding: tuple[int, ...] = (0,),
    output_padding: tuple[int, ...] = (0,),
    dilation: tuple[int, ...] = (1,),
    groups: int = 1,
) -> Array:
    """Spread x [n, g·in, *size] over w [g·in, out, *kernel], by definition: y [n, g·out, …]."""
    k, size = w.shape[2:], x.shape[2:]
    n = len(k)
    stride, padding, output_padding, dilation = (
        tuple(v) * n if len(v) == 1 else tuple(v)
        for v in (stride, padding, output_padding, dilation)
    )
    full = [
        (size[i] - 1) * stride[i] + dilation[i] * (k[i] - 1) + 1 + output_padding[i]
        for i in range(n)
    ]
    grouped = x.reshape(x.shape[0], groups, -1, *size)
    kernel = w.reshape(groups, -1, *w.shape[1:])
    y = np.zeros((x.shape[0], groups, w.shape[1], *full), x.dtype)
    for tap in np.ndindex(*k):
        part = np.einsum("ngi...,gio->ngo...", grouped, kernel[(slice(None),) * 3 + tap])
        spot = tuple(
            slice(t * d, t * d + (s - 1) * st + 1, st)
            for t, d, s, st in zip(tap, dilation, size, stride, strict=True)
        )
        y[(slice(None),) * 3 + spot] += part
    inner = tuple(slice(p, f - p) for p, f in zip(padding, full, strict=True))
    return y.reshape(x.shape[0], -1, *full)[(slice(None),) * 2 + inner]


@dataclass(frozen=True)
class NumpyEmitter:
    """Every primitive computed at once; arithmetic in the dtype of its operands."""

    def op(self, prim: str, *xs: Any, **attrs: Any) -> Array:
        """One primitive of the closed set (see lora_fx.graph.Emitter)."""
        x = xs[0]
        if prim == "matmul":
            return np.asarray(np.matmul(x, xs[1]))
        if prim in ("add", "mul"):
            y = np.asarray(xs[1], x.dtype) if isinstance(xs[1], (int, float)) else xs[1]
            return np.asarray(x + y if prim == "add" else x * y)
        if prim == "div":
            return np.asarray(x / xs[1])
        if prim == "norm":
            return np.asarray(np.sqrt(np.square(x).sum(-1, keepdims=True)))
        if prim == "transpose":
            return np.asarray(np.transpose(x, attrs["perm"]))
        if prim == "reshape":
            return np.asarray(x).reshape(attrs["shape"])
        if prim == "slice":
            index = [slice(None)] * x.ndim
            index[attrs["axis"]] = slice(attrs["start"], attrs["stop"])
            return np.asarray(x[tuple(index)])
        if prim == "pad":
            return np.pad(x, list(zip(attrs["before"], attrs["after"], strict=True)))
        if prim == "einsum":
            return np.asarray(np.einsum(attrs["equation"], *xs))
        if prim == "conv":
            return conv(x, xs[1], **attrs)
        if prim == "conv_transpose":
            return conv_transpose(x, xs[1], **attrs)
        if prim == "gather":
            return np.asarray(x[xs[1]])
        if prim in ("dropout", "detach"):
            return np.asarray(x)
        if prim == "cast":
            return np.asarray(x.astype(numpy_dtype(attrs["dtype"])))
        if prim == "cast_like":
            return np.asarray(x.astype(xs[1].dtype))
        raise LoraFxError(f"the numpy emitter has no primitive {prim!r}")

    def like(self, site: Site, x: Array, w: Array) -> Array:
        """The site's op on arrays."""
        return np.asarray(site.kind.apply(self, site, x, w))

    def parameter(self, name: str, value: Array, role: Role) -> Array:
        """The value itself."""
        return value
