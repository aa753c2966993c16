"""Budgets of adapters, and the best ranks for a budget.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, expect
from lora_fx.targets.found import Found
from lora_fx.targets.keys import applies
from lora_fx.targets.rank_choice import within_budget
from lora_fx.targets.target import Target

FULL = 0.98
"""The share of a budget that ranks should use, if possible."""
MOST = 16
"""The most ranks of one target that are exchanged at a time."""
FORMS = "pass params:100000, flops:2%, flops:1e9 or uniform:8, for example"


@dataclass(frozen=True)
class Budget:
    """A budget for the ranks of an adapter.

    Attributes:
        text: The text that it was read from.
        kind: params, flops, flops% or uniform.
        number: The number after it.
    """

    text: str
    kind: str
    number: float

    @property
    def unit(self) -> str:
        """The unit of costs: params or flops."""
        return "flops" if self.kind.startswith("flops") else "params"

    @classmethod
    def of(cls, text: str) -> Budget:
        """Parse a budget.

        >>> Budget.of("flops:2%").kind, Budget.of("uniform:8").number
        ('flops%', 8.0)
        """
        expect(text, str, "budget", "a text", FORMS)
        kind, _, number = text.partition(":")
        percent = kind == "flops" and number.endswith("%")
        try:
            value = float(number.removesuffix("%") if percent else number)
        except ValueError:
            value = math.nan
        is_known = kind in ("params", "flops", "uniform")
        if not is_known or not math.isfinite(value) or value <= 0:
            raise LoraFxError(f"unknown budget {text!r}", FORMS)
        if not percent and value != math.floor(value):
            raise LoraFxError(f"unknown budget {text!r}", FORMS)
        return cls(text, "flops%" if percent else kind, value)

    def cost(self, target: Target, use: str) -> int:
        """Return the cost of one rank: elements of a and b, or FLOPs of the update's uses."""
        layout = target.layout
        if self.unit == "params":
            return layout.parameters(1)
        ratio = (layout.out_size + layout.in_size) / (layout.out_size * layout.in_size)
        flops = sum(site.flops for site in target.sites if applies(use, site))
        lookup = 2 * layout.out_size  # an embedding multiplies only by b
        return max(round(flops * ratio), lookup)

    def limit(self, found: Found, costs: Mapping[str, int], most: Mapping[str, int]) -> int:
        """Return the budget in its unit.

        Args:
            found: The model, for a share of its FLOPs.
            costs: Cost of one rank, by key.
            most: The highest rank, by key.

        Raises:
            LoraFxError: The budget does not pay for a single rank.
        """
        if self.kind == "uniform":
            rank = int(self.number)
            return sum(cost * min(rank, most[key]) for key, cost in costs.items())
        limit = self.number
        if self.kind == "flops%":
            limit *= found.weight_flops / 100
        cheapest = min(costs, key=lambda key: costs[key])
        if limit < costs[cheapest]:
            raise LoraFxError(
                f"the budget {self.text} is {int(limit)} {self.unit}, but one rank of the "
                f"cheapest target {cheapest!r} takes {costs[cheapest]}",
                "choose a larger budget",
            )
        return int(limit)


def allocate(
    gains: Mapping[str, Array | None], costs: Mapping[str, int], most: Mapping[str, int], limit: int
) -> dict[str, int]:
    """Return ranks that cost at most `limit`, chosen by gain per cost.

    Args:
        gains: The worth of each rank, by key; None where that is not known: such a target gets
            the rank that uniform gives.
        costs: Cost of one rank, by key.
        most: The highest rank, by key.
        limit: The budget, in the unit of the costs.
    """
    # Gains whose greedy choice gives every target the same rank.
    uniform_gains = {key: costs[key] / np.arange(1.0, most[key] + 1) for key in gains}
    uniform_ranks = within_budget(uniform_gains, costs, limit)
    unknown_ranks: dict[str, int] = {}
    spectra: dict[str, Array] = {}
    for key, gain in gains.items():
        if gain is None:
            unknown_ranks[key] = uniform_ranks[key]
        else:
            spectra[key] = np.minimum.accumulate(np.asarray(gain))

    # A rank that is worth nothing still comes before a budget that nobody uses.
    gains_per_cost = [float(gain.max(initial=0.0)) / costs[key] for key, gain in spectra.items()]
    least = 1e-12 * (max(gains_per_cost, default=0.0) or 1.0)
    spectra = {
        key: np.maximum(gain, least * uniform_gains[key][: len(gain)])
        for key, gain in spectra.items()
    }

    limit -= _total(unknown_ranks, costs)
    ranks = within_budget(spectra, costs, limit)
    _fill(ranks, spectra, costs, limit)
    ranks |= unknown_ranks
    return {key: ranks[key] for key in gains}


def _total(ranks: Mapping[str, int], costs: Mapping[str, int]) -> int:
    """Return the total cost of the ranks."""
    return sum(costs[key] * rank for key, rank in ranks.items())


class _Exchange(NamedTuple):
    """An exchange of ranks of one target for ranks of another.

    Attributes:
        fills: Whether FULL of the limit is used after it.
        gain: The change of the gain of all ranks; most often less than 0.
        giver: The target that loses ranks.
        removed: How many.
        taker: The target that gets ranks.
        added: How many.
    """

    fills: bool
    gain: float
    giver: str
    removed: int
    taker: str
    added: int


def _fill(
    ranks: dict[str, int], spectra: Mapping[str, Array], costs: Mapping[str, int], limit: int
) -> None:
    """Exchange ranks of one target for ranks of another until FULL of the limit is used."""
    while _total(ranks, costs) < FULL * limit:
        best: _Exchange | None = None
        for exchange in _exchanges(ranks, spectra, costs, limit):
            if best is None or exchange[:2] > best[:2]:  # one that fills, then the largest gain
                best = exchange
        if best is None:
            break
        ranks[best.giver] -= best.removed
        ranks[best.taker] += best.added


def _exchanges(
    ranks: Mapping[str, int], spectra: Mapping[str, Array], costs: Mapping[str, int], limit: int
) -> Iterator[_Exchange]:
    """Yield every exchange of ranks that uses more of the limit."""
    unused = limit - _total(ranks, costs)
    for giver, removed in _givable(ranks):
        freed = removed * costs[giver]
        loss = float(spectra[giver][ranks[giver] - removed : ranks[giver]].sum())
        available = unused + freed
        for taker, gains in spectra.items():
            rank = ranks[taker]
            added = min(available // costs[taker], len(gains) - rank)
            cost = added * costs[taker]
            if taker == giver or cost <= freed:
                continue
            win = float(gains[rank : rank + added].sum())
            fills = limit - available + cost >= FULL * limit
            yield _Exchange(fills, win - loss, giver, removed, taker, added)


def _givable(ranks: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield every target with each number of ranks that it can lose at a time."""
    for key, rank in ranks.items():
        for count in range(1, min(rank, MOST) + 1):
            yield key, count
