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
from lora_fx.targets.regions import applies
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


def parse_budget(text: str) -> Budget:
    """A budget from its text.

    >>> parse_budget("flops:2%").kind, parse_budget("uniform:8").number
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
    return Budget(text, "flops%" if percent else kind, value)


def cost_of(target: Target, use: str, unit: str) -> int:
    """What one rank costs: elements of a and b, or FLOPs of the uses that an update has."""
    layout = target.layout
    if unit == "params":
        return layout.parameters(1)
    ratio = (layout.out_size + layout.in_size) / (layout.out_size * layout.in_size)
    flops = sum(s.flops for s in target.sites if applies(use, s))
    lookup = 2 * layout.out_size  # an embedding multiplies only by b
    return max(round(flops * ratio), lookup)


def limit_of(
    budget: Budget, found: Found, costs: Mapping[str, int], most: Mapping[str, int]
) -> int:
    """The budget in its unit.

    Args:
        budget: As it was asked for.
        found: The model, for a share of its FLOPs.
        costs: Cost of one rank, by key.
        most: The highest rank, by key.

    Raises:
        LoraFxError: The budget does not pay for a single rank.
    """
    if budget.kind == "uniform":
        return sum(c * min(int(budget.number), most[k]) for k, c in costs.items())
    limit = budget.number
    if budget.kind == "flops%":
        limit *= (found.flops["reached"] + found.flops["refused"]) / 100
    cheapest = min(costs, key=lambda k: costs[k])
    if limit < costs[cheapest]:
        raise LoraFxError(
            f"the budget {budget.text} is {int(limit)} {budget.unit}; one rank of {cheapest!r} "
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


# Which ranks are worth their elements: greedy on σ²/cost over all targets at once.
#
# σ² fall within a target and its ranks cost the same, so the order never takes a rank before the
# one above it. The choice is the best one where the goal falls on a step of the order.


def gains(s: Array) -> Array:
    """σ² by rank, summed over the batch, without those that are rounding alone.

    `s` are singular values, [*batch, k].
    """
    matrices = s.reshape(-1, s.shape[-1])
    floor = matrices.max(initial=0.0) * s.shape[-1] * np.finfo(np.float64).eps
    squares = np.where(matrices > floor, matrices, 0.0) ** 2
    return np.trim_zeros(squares.sum(0), "b")


def _steps(spectra: Mapping[str, Array], costs: Mapping[str, int]) -> list[tuple[str, float]]:
    """Pairs (key, σ²) in the order in which ranks are taken, within a key from the first on."""
    steps = [(key, float(gain)) for key, squares in spectra.items() for gain in squares]
    return sorted(steps, key=lambda step: -step[1] / costs[step[0]])  # equal ones stay in order


def within_budget(
    spectra: Mapping[str, Array], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks of at most `budget` elements; one that does not fit is passed over."""
    ranks = dict.fromkeys(spectra, 0)
    for key, _ in _steps(spectra, costs):
        if costs[key] <= budget:
            ranks[key] += 1
            budget -= costs[key]
    return ranks


def within_loss(
    spectra: Mapping[str, Array], costs: Mapping[str, int], allowed: float
) -> dict[str, int]:
    """The first ranks in order that leave out at most `allowed` of Σ σ², none of them in vain."""
    steps = _steps(spectra, costs)
    squares = np.array([gain for _, gain in steps])
    left = np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # left[t]: Σ σ² without the first t
    count = int(np.argmax(left <= max(allowed, 0.0)))
    ranks, lost = dict.fromkeys(spectra, 0), float(left[count])
    for key, _ in steps[:count]:
        ranks[key] += 1
    closed = set[str]()
    for key, gain in reversed(steps[:count]):  # a cheap one taken late may make another needless
        if key not in closed and lost + gain <= allowed:
            ranks[key] -= 1
            lost += gain
        else:
            closed.add(key)
    return ranks
