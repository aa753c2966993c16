"""Convolutions and their transposes as contractions.

The groups are batch, and the kernel belongs to in, or to out of a transpose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Axes, Emitter, Factors, Site
from lora_fx.ir.kinds import FREE, Apart
from lora_fx.ir.view import Reshape

DEPTHWISE = "depthwise, with one channel per group: too small for a low-rank update"


@dataclass(frozen=True)
class Conv:
    """A convolution: w [g·out, in, *kernel] over x [n, g·in, *size]; in spans the kernel too."""

    name = "conv"  # for any number of dimensions
    has_branch = True
    groups: int = 1

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """The groups are batch, and in is C_in/groups · ∏kernel."""
        if self.groups == 1:
            return Axes((), (0,), tuple(range(1, len(operand))))
        split = (self.groups, operand[0] // self.groups, *operand[1:])
        return Axes((0,), (1,), tuple(range(2, len(split))), (Reshape(split),))

    def apply(self, e: Emitter[V], site: Site, x: V, w: V) -> V:
        """One convolution."""
        return e.op("conv", x, w, groups=self.groups, **site.attrs)

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V:
        """The site's own convolution to g·rank channels, then a 1×1 one with b."""
        channels, *window = site.operand
        ones = (1,) * (len(window) - 1)
        a = e.op("reshape", f.a, shape=(FREE, *window))
        b = e.op("reshape", f.b, shape=(channels, FREE, *ones))
        return e.op("conv", e.like(site, x, a), b, groups=self.groups)

    def along_out(self, site: Site, out: int) -> tuple[int, ...]:
        """The axis of the channels, before those of the size."""
        ones = (1,) * len(site.operand[2:])
        return (out, *ones)


@dataclass(frozen=True)
class ConvTranspose(Apart):
    """A transposed convolution: w [g·in, out, *kernel] over x [n, g·in, *size].

    Every input element is spread over the kernel, so here out spans it: out = C_out/g · ∏kernel.
    """

    name = "conv_transpose"
    has_branch = True
    groups: int = 1

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """A convolution's with out and in swapped: out is C_out/groups · ∏kernel."""
        conv = Conv(self.groups).axes(operand)
        return replace(conv, out=conv.in_, in_=conv.out)

    def apply(self, e: Emitter[V], site: Site, x: V, w: V) -> V:
        """One transposed convolution."""
        return e.op("conv_transpose", x, w, groups=self.groups, **site.attrs)

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V:
        """A 1×1 convolution with a to g·rank channels, then the site's own op with b."""
        channels, *window = site.operand
        ones = (1,) * (len(window) - 1)
        a = e.op("reshape", f.a, shape=(FREE, channels // self.groups, *ones))

        swap = (0, 2, 1) if f.layout.batch_shape else (1, 0)
        b_transposed = e.op("transpose", f.b, perm=swap)
        b = e.op("reshape", b_transposed, shape=(FREE, *window))
        return e.like(site, e.op("conv", x, a, groups=self.groups), b)
