"""Convolutions and their transposes as contractions: groups are batch, the kernel counts."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fx.graph import Emitter, Site, V
from lora_fx.kinds import Apart, Axes, Factors
from lora_fx.view import Reshape


@dataclass(frozen=True)
class Conv:
    """A convolution: w [g·out, in, *kernel] over x [n, g·in, *size]; in spans the kernel too."""

    groups: int = 1

    @property
    def name(self) -> str:
        """Conv, whatever the number of dimensions."""
        return "conv"

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """Groups are batch; in is C_in/groups · ∏kernel."""
        if self.groups == 1:
            return Axes((), (0,), tuple(range(1, len(operand))))
        split = (self.groups, operand[0] // self.groups, *operand[1:])
        return Axes((0,), (1,), tuple(range(2, len(split))), (Reshape(split),))

    def apply(self, e: Emitter[V], site: Site, x: V, w: V) -> V:
        """One convolution."""
        return e.op("conv", x, w, groups=self.groups, **site.attrs)

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V | None:
        """The site's own convolution to g·rank channels, then a 1×1 one with b."""
        g, window = self.groups, site.operand[1:]
        a = e.op("reshape", f.a, shape=(g * f.rank, *window))
        b = e.op("reshape", f.b, shape=(site.operand[0], f.rank, *(1 for _ in window[1:])))
        return e.op("conv", e.like(site, x, a), b, groups=g)

    def along_out(self, site: Site, out: int) -> tuple[int, ...]:
        """The axis of the channels, before those of the size."""
        return (out, *(1 for _ in site.operand[2:]))


@dataclass(frozen=True)
class ConvTranspose(Apart):
    """A transposed convolution: w [g·in, out, *kernel] over x [n, g·in, *size].

    Every input element is spread over the kernel, so here out spans it: out = C_out/g · ∏kernel.
    """

    groups: int = 1

    @property
    def name(self) -> str:
        """conv_transpose, whatever the number of dimensions."""
        return "conv_transpose"

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """Groups are batch; out is C_out/groups · ∏kernel."""
        if self.groups == 1:
            return Axes((), tuple(range(1, len(operand))), (0,))
        split = (self.groups, operand[0] // self.groups, *operand[1:])
        return Axes((0,), tuple(range(2, len(split))), (1,), (Reshape(split),))

    def apply(self, e: Emitter[V], site: Site, x: V, w: V) -> V:
        """One transposed convolution."""
        return e.op("conv_transpose", x, w, groups=self.groups, **site.attrs)

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V | None:
        """A 1×1 convolution with a to g·rank channels, then the site's own op with b."""
        g, window = self.groups, site.operand[1:]
        ones = tuple(1 for _ in window[1:])
        a = e.op("reshape", f.a, shape=(g * f.rank, site.operand[0] // g, *ones))
        swap = (0, 2, 1) if f.layout.batch_shape else (1, 0)
        b = e.op("reshape", e.op("transpose", f.b, perm=swap), shape=(g * f.rank, *window))
        return e.like(site, e.op("conv", x, a, groups=g), b)
