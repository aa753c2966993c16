"""loha: ΔW = alpha/r · (b₁a₁ ∘ b₂a₂), the product of two low-rank matrices element by element.

Hyeon-Woo et al. 2021 (arXiv:2108.06098). Such a product has rank r² at most, and its factors have
a row for every pair of rows:

    a[(i, j)] = a₁[i] ∘ a₂[j]        b[:, (i, j)] = b₁[:, i] ∘ b₂[:, j]

So `LowRank.a` and `LowRank.b` are of rank r², and whoever folds, switches or merges the update
needs to know nothing of this file. What trains are the four factors of rank r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.lowrank import LowRank, of_parts
from lora_fx.adapter.variant_protocol import Beginning, Read, Variant
from lora_fx.dtypes import Array, factor_dtype
from lora_fx.inputs import generator
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.numpy_emitter import NumpyEmitter


@dataclass(frozen=True)
class Loha(Variant):
    """The variant loha, whose four factors have rank r.

    Attributes:
        batch: The batch axes of the update that this is the variant of.
        width: Its inputs; 0 where this is the variant of no update.
        height: Its outputs.
        low: The rank r of the four factors.
    """

    title = "LoHa"
    made_of = ("hada_a1", "hada_b1", "hada_a2", "hada_b2")
    proportional = "hada_a2"
    zero_where = ("hada_a1", "hada_b1", "hada_a2", "hada_b2")
    batch: tuple[int, ...] = ()
    width: int = 0
    height: int = 0
    low: int = 0

    def of(self, low: LowRank) -> Variant | None:
        """Return this variant with the sizes of the update, if the update has the four factors."""
        if set(low.variant_tensors) != set(self.made_of):
            return None
        sized = self._sized(low.variant_tensors)
        same = np.array_equal(sized.a(NumpyEmitter(), low.variant_tensors.__getitem__), low.a)
        if not same:
            return None
        same = np.array_equal(sized.b(NumpyEmitter(), low.variant_tensors.__getitem__), low.b)
        return sized if same else None

    def _sized(self, tensors: Mapping[str, Array]) -> Loha:
        """Return this variant with the sizes of the four factors."""
        *batch, rank, width = tensors["hada_a1"].shape
        height = tensors["hada_b1"].shape[-2]
        return replace(self, batch=tuple(batch), width=width, height=height, low=rank)

    def prepared(self, low: LowRank, beginning: Beginning) -> LowRank:
        """Draw three factors as PEFT does, uniform in ±1/√in or ±1/√r; a₂ is zero, so W' = W."""
        rng = generator(f"{beginning.key} loha", beginning.seed)
        bound = 1.0 / math.sqrt(low.rank)
        kind = low.a.dtype

        def uniform(shape: tuple[int, ...]) -> Array:
            return of_parts(lambda size: rng.uniform(-bound, bound, size), shape, kind).astype(kind)

        values = {
            "hada_a1": low.a,
            "hada_b1": uniform(low.b.shape),
            "hada_a2": np.zeros_like(low.a),
            "hada_b2": uniform(low.b.shape),
        }
        return self.with_values(replace(low, alpha=low.alpha * low.rank), values)

    def with_values(self, low: LowRank, values: Mapping[str, Array]) -> LowRank:
        """See Variant."""
        tensors = {field: values[field] for field in self.made_of}
        sized = self._sized(tensors)
        a = sized.a(NumpyEmitter(), tensors.__getitem__)
        b = sized.b(NumpyEmitter(), tensors.__getitem__)
        return replace(low, a=a, b=b, variant_tensors=tensors)

    def asked(self, low: LowRank) -> tuple[int, float]:
        """Return r, and the alpha over r that is the scale."""
        rank = low.variant_tensors["hada_a1"].shape[-2]
        return rank, low.scale * rank

    def a(self, e: Ops[V], read: Read[V]) -> V:
        """Return a₁[i] ∘ a₂[j] for every pair of rows, [*batch, r², in]."""
        first = e.op("reshape", read("hada_a1"), shape=(*self.batch, self.low, 1, self.width))
        second = e.op("reshape", read("hada_a2"), shape=(*self.batch, 1, self.low, self.width))
        pairs = e.op("mul", first, second)
        return e.op("reshape", pairs, shape=(*self.batch, self.low**2, self.width))

    def b(self, e: Ops[V], read: Read[V]) -> V:
        """Return b₁[:, i] ∘ b₂[:, j] for every pair of columns, [*batch, out, r²]."""
        first = e.op("reshape", read("hada_b1"), shape=(*self.batch, self.height, self.low, 1))
        second = e.op("reshape", read("hada_b2"), shape=(*self.batch, self.height, 1, self.low))
        pairs = e.op("mul", first, second)
        return e.op("reshape", pairs, shape=(*self.batch, self.height, self.low**2))

    def drawn(self, low: LowRank, key: str, seed: int) -> Mapping[str, Array]:
        """Return normal values, so that each of the two products has elements of variance 1/in."""
        rng = generator(f"{key} loha", seed)
        kind = factor_dtype(low.a.dtype.name)
        values = {}
        for field in self.made_of:
            shape = low.variant_tensors[field].shape
            variance = 1.0 / math.sqrt(self.width)
            if field.startswith("hada_b"):
                variance = 1.0 / self.low
            drawn = of_parts(rng.standard_normal, shape, kind) * math.sqrt(variance)
            values[field] = drawn.astype(kind)
        return values
