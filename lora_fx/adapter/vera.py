"""vera: ΔW = diag(λ_b) · B · diag(λ_d) · A; A and B are drawn once, and only two vectors train.

Kopiczko et al. 2023 (arXiv:2310.11454). There is one A [r, widest in] and one B [widest out, r] for
all targets: each takes the first of their columns or rows. The scale is 1, so that VeRA has no
alpha. As in PEFT 0.21 λ_b begins at zero and λ_d at .1, and A and B are uniform in ±√(6/columns).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant_protocol import Beginning, Read, Variant
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.inputs import generator
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.layout import Layout
from lora_fx.text import JsonView

WIDEST = "vera_widest"
"""In an adapter's metadata: its file does not tell how many inputs each layer has."""
D_INITIAL = 0.1
"""The first value of λ_d, the default of PEFT's d_initial."""


class Vera(Variant):
    """The variant vera.

    ==============  ==================  ====================================
    field           shape               trained
    ==============  ==================  ====================================
    projection_a    [*batch, r, in]     no: the first columns of the one A
    projection_b    [*batch, out, r]    no: the first rows of the one B
    lambda_d        [*batch, r, 1]      yes
    lambda_b        [*batch, out, 1]    yes
    ==============  ==================  ====================================
    """

    title = "VeRA"
    made_of = ("projection_a", "projection_b", "lambda_d", "lambda_b")
    proportional = "lambda_b"
    zero_where = ("lambda_d", "lambda_b")
    scale_is_one = True

    def prepared(self, low: LowRank, beginning: Beginning) -> LowRank:
        """Take this target's part of A and B; λ_b is zero, so that W' = W.

        Raises:
            LoraFxError: The weight is complex.
        """
        if low.a.dtype.kind == "c":
            raise LoraFxError(
                f"{beginning.key!r} is complex; variant vera has real vectors alone",
                "leave it out with exclude, or use another variant",
            )
        *batch, rank, width = low.a.shape
        height = low.b.shape[-2]
        widest_in, widest_out = beginning.widest or (width, height)
        a, b = _projections(rank, widest_in, widest_out, beginning.seed)
        values = {
            "projection_a": np.array(np.broadcast_to(a[:, :width], low.a.shape)),
            "projection_b": np.array(np.broadcast_to(b[:height], low.b.shape)),
            "lambda_d": np.full((*batch, rank, 1), D_INITIAL, np.float32),
            "lambda_b": np.zeros((*batch, height, 1), np.float32),
        }
        return self.with_values(replace(low, alpha=float(rank)), values)

    def within(self, low: LowRank, size: int) -> LowRank:
        """Return the update with the first columns of an A that is as wide as the widest layer."""
        tensors = low.variant_tensors
        outputs = low.b.shape[-2]
        width = size // outputs
        is_whole = low.layout is None and low.b.ndim == 2 and width * outputs == size
        if not is_whole or width >= tensors["projection_a"].shape[-1]:
            return low
        return self.with_values(
            low, {**tensors, "projection_a": tensors["projection_a"][:, :width]}
        )

    def fitted(self, low: LowRank, key: str, layout: Layout) -> LowRank:
        """See Variant."""
        return self.within(low, layout.in_size * layout.out_size)

    def a(self, e: Ops[V], read: Read[V]) -> V:
        """Return diag(λ_d) · A."""
        return e.op("mul", read("projection_a"), read("lambda_d"))

    def b(self, e: Ops[V], read: Read[V]) -> V:
        """Return diag(λ_b) · B."""
        return e.op("mul", read("projection_b"), read("lambda_b"))

    def drawn(self, low: LowRank, key: str, seed: int) -> Mapping[str, Array]:
        """Return normal vectors for which ΔW is about as large as W usually is."""
        rng = generator(f"{key} vera", seed)
        # A has elements of variance 2/widest in, and B of variance 2/r.
        size = 1.0 / math.sqrt(2.0)
        return {
            field: (size * rng.standard_normal(low.variant_tensors[field].shape)).astype(np.float32)
            for field in ("lambda_d", "lambda_b")
        }


@lru_cache(maxsize=4)
def _projections(rank: int, widest_in: int, widest_out: int, seed: int) -> tuple[Array, Array]:
    """Return the one A [rank, widest in] and the one B [widest out, rank] of an adapter, fp32."""
    rng = generator("vera's projections", seed)
    drawn = []
    for shape in ((rank, widest_in), (widest_out, rank)):
        bound = math.sqrt(6.0 / shape[1])
        drawn.append(rng.uniform(-bound, bound, shape).astype(np.float32))
    return drawn[0], drawn[1]


def refuse_unknown_inputs(entries: Mapping[str, object], metadata: JsonView, what: str) -> None:
    """Raise for updates of a file that does not tell the inputs of its layers.

    Args:
        entries: Those of the adapter.
        metadata: The adapter's.
        what: What would take A of the widest layer for that of each, for the message.
    """
    if not metadata.get(WIDEST):
        return
    for key, entry in entries.items():
        if isinstance(entry, LowRank) and entry.variant == "vera" and entry.layout is None:
            raise LoraFxError(
                f"{key!r} is VeRA of a file that has A for the widest layer alone; {what} needs "
                "the inputs of each layer",
                "bind it to its model first: lora_fx.insert(model, …, adapter=PATH).adapter() has "
                "them",
            )
