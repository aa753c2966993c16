"""The real part of a Fourier transform as products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lora_fx.fx.graph.nodes import argument, hint, value

aten = torch.ops.aten

LONGEST = 4096
"""A transform of more points stays one: its table of waves would be too large."""


def _fourier(graph: fx.Graph, node: fx.Node) -> None:
    """real(fft(x)) of a real x and no padding or scale; the transform may be over several axes."""
    of, transforms = node.args[0], (aten.fft_fftn.default, aten.fft_fft.default)
    if not isinstance(of, fx.Node) or of.target not in transforms:
        return
    x, norm, dims = of.args[0], argument(of, "norm"), argument(of, "dim")
    lengths = argument(of, "s") or argument(of, "n")
    given = value(x)
    if lengths or norm not in (None, "backward") or not isinstance(given, Tensor):
        return
    axes = list(range(given.dim())) if dims is None else [dims] if isinstance(dims, int) else dims
    short = all(hint(given.shape[d]) <= LONGEST for d in axes)
    if given.dtype.is_floating_point and short:
        node.target, node.args = real_fourier, (x, axes)


def real_fourier(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The real part of the discrete Fourier transform of a real x over some axes."""
    real, imaginary = x, None
    for d in dims:
        cos, sin = _waves(x, d)
        a, b = real.transpose(d, -1), None if imaginary is None else imaginary.transpose(d, -1)
        turned = a @ cos if b is None else a @ cos + b @ sin
        other = -(a @ sin) if b is None else b @ cos - a @ sin
        real, imaginary = turned.transpose(d, -1), other.transpose(d, -1)
    return real


def _waves(x: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2π·jk/n, their phases within half a turn, where floats are finest."""
    k = torch.arange(x.shape[d], device=x.device)
    n = torch.full((), x.shape[d], device=x.device)  # the exporter takes no symbol in % and >
    turns = torch.outer(k, k) % n
    turns = torch.where(2 * turns > n, turns - n, turns)
    phase = turns.to(x.dtype) * (2 * math.pi) / n
    return phase.cos(), phase.sin()
