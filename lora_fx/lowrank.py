"""The maths of a low-rank update, once: layout, ΔW = s·b·a, and its initial values.

Shapes: `a` [*batch, rank, in], `b` [*batch, out, rank]; ΔW in [*batch, out, in] order is
s·(b @ a), and `Layout` says how that lies in the stored parameter. Hu et al. 2021
(arXiv:2106.09685); rsLoRA's scale alpha/√rank is Kalajdzievski 2023 (arXiv:2312.03732).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_fx.dtypes import Array
from lora_fx.graph import Emitter, V
from lora_fx.product import product
from lora_fx.view import Opaque, Region, Tracked


@dataclass(frozen=True)
class Layout:
    """How [*batch, out, in] lies in a stored tensor (or a region of one).

    Attributes:
        shape: The stored shape, with an axis split where only a part of it is batch, out or in.
        batch: Axes of `shape` that are batch (experts of a stack, groups of a convolution).
        out: Axes of `shape` that make up out, major first.
        in_: Axes of `shape` that make up in, major first.
        stored: The stored shape itself.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    out: tuple[int, ...]
    in_: tuple[int, ...]
    stored: tuple[int, ...]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes; empty for a plain matrix."""
        return tuple(self.shape[i] for i in self.batch)

    @property
    def out_size(self) -> int:
        """Rows of one matrix."""
        return math.prod(self.shape[i] for i in self.out)

    @property
    def in_size(self) -> int:
        """Columns of one matrix."""
        return math.prod(self.shape[i] for i in self.in_)

    @property
    def max_rank(self) -> int:
        """The smaller side of one matrix: no update has a higher rank."""
        return min(self.out_size, self.in_size)

    def parameters(self, rank: int) -> int:
        """Number of elements in a and b together."""
        return math.prod(self.batch_shape) * rank * (self.out_size + self.in_size)

    def transposed(self) -> Layout:
        """The layout of a use that reads the tensor the other way round."""
        return Layout(self.shape, self.batch, self.in_, self.out, self.stored)

    def narrow(self, bounds: Region) -> Layout | None:
        """The layout of a part of the stored tensor; None where it cuts an axis that is split.

        Args:
            bounds: Half-open, per stored axis of this layout.
        """
        shape = list(self.shape)
        at = 0
        for (lo, hi), n in zip(bounds, self.stored, strict=True):
            first = at
            while at < len(shape) and (at == first or math.prod(shape[first:at]) < n):
                at += 1
            if (lo, hi) != (0, n):
                if at - first != 1 or not 0 <= lo < hi <= n:
                    return None
                shape[first] = hi - lo
        stored = tuple(hi - lo for lo, hi in bounds)
        return Layout(tuple(shape), self.batch, self.out, self.in_, stored)

    def starts(self, bounds: Region) -> tuple[int, ...]:
        """Where a part that `narrow` allows begins, per axis of `shape`."""
        result: list[int] = []
        for (lo, _), n in zip(bounds, self.stored, strict=True):
            first = len(result)
            while len(result) < len(self.shape) and (
                len(result) == first or math.prod(self.shape[first : len(result)]) < n
            ):
                result.append(lo if len(result) == first else 0)
        return tuple(result)

    def from_stored(self, e: Emitter[V], value: V) -> V:
        """The stored shape → [*batch, out, in], in any IR."""
        order = self.batch + self.out + self.in_
        whole = (*self.batch_shape, self.out_size, self.in_size)
        if tuple(self.shape) != self.stored:
            value = e.op("reshape", value, shape=self.shape)
        if order != tuple(range(len(order))):
            value = e.op("transpose", value, perm=order)
        if tuple(self.shape[i] for i in order) != whole:
            value = e.op("reshape", value, shape=whole)
        return value

    def to_stored(self, e: Emitter[V], delta: V) -> V:
        """[*batch, out, in] → the stored shape, in any IR."""
        order = self.batch + self.out + self.in_
        split = tuple(self.shape[i] for i in order)
        inverse = tuple(order.index(i) for i in range(len(order)))
        whole = (*self.batch_shape, self.out_size, self.in_size)
        if split != whole:
            delta = e.op("reshape", delta, shape=split)
        if inverse != tuple(range(len(inverse))):
            delta = e.op("transpose", delta, perm=inverse)
        if tuple(self.shape) != self.stored:
            delta = e.op("reshape", delta, shape=self.stored)
        return delta

    def to_json(self) -> dict[str, list[int]]:
        """Plain lists, for a manifest."""
        return {k: list(getattr(self, k)) for k in ("shape", "batch", "out", "in_", "stored")}

    @classmethod
    def from_json(cls, data: dict[str, list[int]]) -> Layout:
        """The inverse of to_json."""
        return cls(**{k: tuple(v) for k, v in data.items()})


def plain_layout(shape: tuple[int, ...]) -> Layout:
    """Axis 0 is out and the rest is in: what nn.Linear and an ungrouped convolution store."""
    return Layout(shape, (), (0,), tuple(range(1, len(shape))), shape)


def layout_of(
    tracked: Tracked, batch: tuple[int, ...], out: tuple[int, ...], in_: tuple[int, ...]
) -> Layout:
    """The Layout of an operand whose axes play these parts.

    Runs of one stored axis that stayed neighbours in the same part are joined again, so that two
    uses of a tensor compare equal however they split it.

    Raises:
        Opaque: An operand axis is read by no part.
    """
    parts = [[a for axis in axes for a in tracked.axes[axis]] for axes in (batch, out, in_)]
    parts = [[a for a in part if tracked.size[a] != 1] for part in parts]
    runs: list[tuple[int, list[int]]] = []  # (part, atoms), in stored order
    for row in tracked.stored:
        fresh = True
        for atom in (a for a in row if tracked.size[a] != 1):
            part = next((p for p, atoms in enumerate(parts) if atom in atoms), -1)
            if part < 0:
                raise Opaque("a stored axis is not read")
            if not fresh and runs[-1][0] == part:
                last = parts[part].index(runs[-1][1][-1])
                if part and parts[part][last + 1 : last + 2] == [atom]:
                    runs[-1][1].append(atom)
                    continue
            runs.append((part, [atom]))
            fresh = False
        if fresh:  # an axis of size 1: keep it, as out if out is empty, else as in
            runs.append((-1, []))
    sides = [
        sorted(
            (i for i, (p, _) in enumerate(runs) if p == part),
            key=lambda i, part=part: parts[part].index(runs[i][1][0]),  # type: ignore[misc]
        )
        for part in range(3)
    ]
    for i, (part, _) in enumerate(runs):
        if part < 0:
            sides[1 if not sides[1] else 2].append(i)
    shape = tuple(math.prod(tracked.size[a] for a in atoms) for _, atoms in runs)
    stored = tuple(hi - lo for lo, hi in tracked.region)
    return Layout(shape, tuple(sides[0]), tuple(sides[1]), tuple(sides[2]), stored)


@dataclass(frozen=True)
class LowRank:
    """One low-rank update ΔW = scale · b @ a.

    Attributes:
        a: [*batch, rank, in], fp32 master.
        b: [*batch, out, rank], fp32 master.
        alpha: Numerator of the scale.
        layout: How [*batch, out, in] lies in the stored tensor; None while unbound.
        variant: Name of the update's kind (lora_fx.variant); rslora: alpha/√rank, else alpha/rank.
        use: The alias of the parameter through which the update applies; empty for all uses.
        magnitude: [out] of DoRA: rows of W + ΔW in [out, in] order are rescaled to these norms
            (`lora_fx.dora` has the stored axis by op); None elsewhere.
        frozen: How many of the last ranks do not train: what a start from W or its gradient
            takes off, so that the base stays as it is.
    """

    a: Array
    b: Array
    alpha: float
    layout: Layout | None = None
    variant: str = "lora"
    use: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    magnitude: Array | None = None
    frozen: int = 0

    @property
    def rank(self) -> int:
        """Columns of b."""
        return int(self.b.shape[-1])

    @property
    def scale(self) -> float:
        """alpha/rank, or alpha/√rank for rslora."""
        return scale_of(self.alpha, self.rank, self.variant)

    @property
    def shape(self) -> tuple[int, ...]:
        """[*batch, out, in] of ΔW."""
        return (*self.b.shape[:-1], int(self.a.shape[-1]))

    def block(self, batch: int, rows: slice, columns: slice, out: Array | None = None) -> Array:
        """s·ΔW[batch][rows, columns] in the dtype of a and b: the product, then ·s: PEFT's order.

        `out` may be an array to compute in.
        """
        a = self.a.reshape(-1, *self.a.shape[-2:])[batch]
        b = self.b.reshape(-1, *self.b.shape[-2:])[batch]
        delta = product(b[rows], a[:, columns], out)
        if self.scale != 1.0:
            np.multiply(delta, delta.dtype.type(self.scale), out=delta)
        return delta

    def matrix(self, dtype: npt.DTypeLike = np.float64) -> Array:
        """s·b@a, [*batch, out, in], in `dtype`."""
        product = np.matmul(self.b.astype(dtype), self.a.astype(dtype))
        return np.asarray(product * np.asarray(self.scale, dtype))


@dataclass(frozen=True)
class Full:
    """A whole tensor trained beside the low-rank updates (PEFT's modules_to_save)."""

    value: Array


def scale_of(alpha: float, rank: int, variant: str = "lora") -> float:
    """The factor before b @ a. PEFT's conventions."""
    return alpha / math.sqrt(rank) if variant == "rslora" else alpha / rank


def alpha_of(scale: float, rank: int, variant: str = "lora") -> float:
    """The inverse of scale_of."""
    return scale * (math.sqrt(rank) if variant == "rslora" else rank)


def default_alpha(rank: int) -> float:
    """Alpha where none is given: 2·rank."""
    return 2.0 * rank


def generator(key: str, seed: int) -> np.random.Generator:
    """A generator of its own for one key: the same numbers whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))


def draw(
    key: str, layout: Layout, rank: int, seed: int, which: str = "kaiming"
) -> tuple[Array, Array]:
    """Initial a and b in fp32 for one target, from a generator of its own.

    The numbers depend on (seed, key) only, never on the order of targets or on global state.
    kaiming: a uniform in ±1/√in (PEFT's kaiming_uniform with a=√5), b zero. probe: both normal,
    a with variance 1/in and b with variance 1/rank, for proofs of effect.
    """
    rng = generator(key, seed)
    a_shape = (*layout.batch_shape, rank, layout.in_size)
    b_shape = (*layout.batch_shape, layout.out_size, rank)
    if which == "probe":
        a = rng.standard_normal(a_shape) / math.sqrt(layout.in_size)
        b = rng.standard_normal(b_shape) / math.sqrt(rank)
        return a.astype(np.float32), b.astype(np.float32)
    bound = 1.0 / math.sqrt(layout.in_size)
    a = rng.uniform(-bound, bound, a_shape)
    return a.astype(np.float32), np.zeros(b_shape, np.float32)
