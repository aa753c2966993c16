"""What adapters may cost, and the ranks that spend it best.

==============  ==========================================================
params:N        N elements of all A and B together
flops:N         N more FLOPs a forward, at the example's sizes, unmerged
flops:F%        F percent of the FLOPs of the model's weight matmuls
uniform:R       the elements that rank R takes at every target
==============  ==========================================================

Ranks are taken greedily by gain per cost; what does not fit is passed over. Where that leaves more
than 2 % of the budget unused, as it may where one rank is a large part of it, ranks are exchanged
for others that fill it better, at the least loss of gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.targets.found import Found
from lora_fx.targets.keys import applies
from lora_fx.targets.rank_choice import within_budget
from lora_fx.targets.target import Target

FULL = 0.98
"""Share of a budget that has to be used, where ranks allow it."""
MOST = 16
"""At most so many ranks of one target are exchanged at a time."""
FORMS = "params:100000, flops:2%, flops:1e9 or uniform:8"


@dataclass(frozen=True)
class Budget:
    """A budget as it was asked for: kind params, flops, flops% or uniform, and its number."""

    text: str
    kind: str
    number: float

    @property
    def unit(self) -> str:
        """What costs are counted in: params or flops."""
        return "flops" if self.kind.startswith("flops") else "params"

    @classmethod
    def of(cls, text: str) -> Budget:
        """A budget from its text.

        >>> Budget.of("flops:2%").kind, Budget.of("uniform:8").number
        ('flops%', 8.0)
        """
        kind, _, number = text.partition(":")
        percent = kind == "flops" and number.endswith("%")
        try:
            value = float(number.removesuffix("%") if percent else number)
        except ValueError:
            value = math.nan
        whole = percent or value == math.floor(value) if math.isfinite(value) else False
        if kind not in ("params", "flops", "uniform") or not (whole and value > 0):
            raise LoraFxError(f"no budget {text!r}", FORMS)
        return cls(text, "flops%" if percent else kind, value)

    def cost(self, target: Target, use: str) -> int:
        """What one rank costs: elements of a and b, or FLOPs of the uses that an update has."""
        layout = target.layout
        if self.unit == "params":
            return layout.parameters(1)
        ratio = (layout.out_size + layout.in_size) / (layout.out_size * layout.in_size)
        flops = sum(s.flops for s in target.sites if applies(use, s))
        lookup = 2 * layout.out_size  # an embedding multiplies only by b
        return max(round(flops * ratio), lookup)

    def limit(self, found: Found, costs: Mapping[str, int], most: Mapping[str, int]) -> int:
        """The budget in its unit.

        Args:
            found: The model, for a share of its FLOPs.
            costs: Cost of one rank, by key.
            most: The highest rank, by key.

        Raises:
            LoraFxError: The budget does not pay for a single rank.
        """
        if self.kind == "uniform":
            return sum(c * min(int(self.number), most[k]) for k, c in costs.items())
        limit = self.number
        if self.kind == "flops%":
            limit *= found.weight_flops / 100
        cheapest = min(costs, key=lambda k: costs[k])
        if limit < costs[cheapest]:
            raise LoraFxError(
                f"the budget {self.text} is {int(limit)} {self.unit}; one rank of {cheapest!r} "
                f"takes {costs[cheapest]}, and no target takes less",
                "allow more",
            )
        return int(limit)


def allocate(
    gains: Mapping[str, Array | None], costs: Mapping[str, int], most: Mapping[str, int], limit: int
) -> dict[str, int]:
    """Ranks that cost at most `limit`, by gain per cost.

    Args:
        gains: What each rank is worth, by key; None where that is not known: such a target gets
            the rank that uniform gives.
        costs: Cost of one rank, by key.
        most: The highest rank, by key.
        limit: The budget, in the unit of the costs.
    """
    even = {k: costs[k] / np.arange(1.0, most[k] + 1) for k in gains}
    fixed = {k: r for k, r in within_budget(even, costs, limit).items() if gains[k] is None}
    known = {k: np.minimum.accumulate(np.asarray(g)) for k, g in gains.items() if g is not None}
    best = max((float(g.max(initial=0.0)) / costs[k] for k, g in known.items()), default=0.0)
    # A rank that is worth nothing still comes before a budget that nobody uses.
    spectra = {
        k: np.maximum(g, 1e-12 * (best or 1.0) * even[k][: len(g)]) for k, g in known.items()
    }
    left = limit - sum(costs[k] * r for k, r in fixed.items())
    chosen = _filled(within_budget(spectra, costs, left), spectra, costs, left)
    ranks = {**fixed, **chosen}
    return {k: ranks[k] for k in gains}


def _filled(
    ranks: dict[str, int], spectra: Mapping[str, Array], costs: Mapping[str, int], limit: int
) -> dict[str, int]:
    """Exchange a few ranks of one target for some of another until FULL of the limit is used."""
    used = sum(costs[k] * r for k, r in ranks.items())
    while used < FULL * limit:
        best: tuple[bool, float, str, int, str, int] | None = None
        for i, gone in ((k, t) for k, r in ranks.items() for t in range(1, min(r, MOST) + 1)):
            lost = float(spectra[i][ranks[i] - gone : ranks[i]].sum())
            free = limit - used + gone * costs[i]
            for j, gains in spectra.items():
                more = min(free // costs[j], len(gains) - ranks[j])
                if j == i or more * costs[j] <= gone * costs[i]:
                    continue
                won = float(gains[ranks[j] : ranks[j] + more].sum())
                enough = limit - free + more * costs[j] >= FULL * limit
                if best is None or (enough, won - lost) > best[:2]:
                    best = enough, won - lost, i, gone, j, more
        if best is None:
            break
        _, _, i, gone, j, more = best
        ranks[i], ranks[j] = ranks[i] - gone, ranks[j] + more
        used += more * costs[j] - gone * costs[i]
    return ranks
