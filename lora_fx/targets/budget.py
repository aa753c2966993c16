"""What adapters may cost, what ranks are worth, and those that spend it best.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import Layout
from lora_fx.targets.target import Found, Target, applies

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


# What one more rank of a target is worth, by four methods, from what a calibration pass saw.


# A method says what one more rank of a target is worth: gains by rank, none larger than the one
# before it. `lora_fx.targets.budget` spends a budget on them, the largest gain per cost first.


@dataclass(frozen=True)
class TargetStatistics:
    """What a method knows of one target.

    Attributes:
        layout: The axes of the target.
        cost: What one rank costs, in the unit of the budget.
        moments: What calibration saw; empty where the method wanted nothing.
        weight: A function that reads W, [*batch, out, in].
    """

    layout: Layout
    cost: int
    moments: Moments
    weight: Callable[[], Array]


Gains = Callable[[TargetStatistics], Array | None]


class Method(NamedTuple):
    """One way to decide which target deserves which rank.

    Attributes:
        wanted: The names in STATISTICS that it reads.
        gains: The gains of one target, [max_rank], or None where calibration could not read what
            it needs.
    """

    wanted: tuple[str, ...]
    gains: Gains


# eva: how much of a target's input each direction explains. Paischer et al. 2024, 2410.07170.
#
#     gain_j = λ_j / Σλ,    λ of E[x xᵀ]
#
# EVA sorts these shares of all layers together and takes the largest; here they are taken per cost,
# as by the other methods, so that a budget is exact. x is not centred, as in the start `eva`.


def eva(seen: TargetStatistics) -> Array | None:
    """The share of E[x xᵀ] that each direction explains, [max_rank]."""
    inputs = seen.moments.inputs
    if inputs is None:
        return None
    one_hot = inputs.ndim == 1  # then its diagonal is its spectrum
    rising = np.sort(inputs) if one_hot else np.linalg.eigvalsh(inputs)
    every = np.maximum(rising[..., ::-1], 0.0).reshape(-1, inputs.shape[-1]).sum(0)
    total = float(every.sum())
    return np.asarray((every / total if total else every)[: seen.layout.max_rank])


# importance: by how much the weight's own gradient would move it. He et al., GoRA, 2502.12171.
#
#     I = mean |W ∘ ∂L/∂W|        gain_j = I/j,    j = 1 …
#
# ∂L/∂W is that of the mean loss over the data. GoRA gives every layer a share of the budget in
# proportion to I; greedy on I/j per cost does the same with whole ranks and an exact budget.
# GoRA's values of A and B are a start (`init`), and not part of this.


def importance(seen: TargetStatistics) -> Array | None:
    """Mean |W ∘ ∂L/∂W|, shared out as 1/j over the ranks, [max_rank]."""
    gradient = seen.moments.gradient
    if gradient is None:
        return None
    mean = float(np.abs(seen.weight() * gradient).mean())
    return mean / np.arange(1.0, seen.layout.max_rank + 1)


# kfac: how much gradient falls on each direction of a target's output.
#
#     gain_j = T · λ_j(E[dy dyᵀ]) · tr E[x xᵀ],    λ_1 ≥ λ_2 ≥ …
#
# The Fisher information of W is about T · E[x xᵀ] ⊗ E[dy dyᵀ] (K-FAC: Martens and Grosse 2015,
# 1503.05671), T the rows of x an example. Along the j-th direction of the output it holds gain_j:
# the mean square of the gradient that a row of rank one could take there. Rows are not averaged
# before they are squared, unlike in the spectrum of ∂L/∂W. A stack of matrices adds up over its
# batch.


def kfac(seen: TargetStatistics) -> Array | None:
    """The Fisher information along each direction of the output, [max_rank]."""
    power, outputs, rows = seen.moments.power, seen.moments.outputs, seen.moments.rows
    if power is None or outputs is None:
        return None
    falling = np.linalg.eigvalsh(outputs)[..., ::-1][..., : seen.layout.max_rank]
    every = rows * np.maximum(falling, 0.0) * power[..., None]
    return np.asarray(every.reshape(-1, every.shape[-1]).sum(0))


# uniform: one rank for all targets. PEFT's default, and this project's. Reads no data.
#
#     gain_j = cost/j,    j = 1 …
#
# per cost that is 1/j for every target, so that every target gets its j-th rank before any gets
# its next; a target that is full leaves its share to the others.


def uniform(seen: TargetStatistics) -> Array | None:
    """Gains that make the j-th rank of every target worth the same, per cost, [max_rank]."""
    return seen.cost / np.arange(1.0, seen.layout.max_rank + 1)


METHODS: Mapping[str, Method] = {
    "uniform": Method((), uniform),
    "importance": Method(("gradient",), importance),
    "kfac": Method(("power", "outputs"), kfac),
    "eva": Method(("inputs",), eva),
}


# What a calibration pass saw at each target, and how its batches are added up.
#
# x are the rows that a target's uses read, dy = ∂L/∂y the gradients at what they make, one row a
# position: a token, a pixel with its kernel window, an id. Sums run over all batches in fp64. L is
# the mean loss of the data; dy is taken of the loss of one example, N·∂L/∂y for a batch of N, so
# that its size does not depend on how the data was cut into batches.


STATISTICS = ("inputs", "power", "outputs", "gradient")
"""What a calibration pass can be asked for; see Moments."""
WIDE = 16384
"""A side that is longer has no second moment here: in fp64 it would take 2 GB."""


@dataclass(frozen=True)
class Moments:
    """What a pass saw of one target, in the axes [*batch, out, in] of its Layout.

    Attributes:
        inputs: E[x xᵀ], [*batch, in, in]; [in] for lookups, whose x is one-hot: its diagonal.
        power: E[xᵀx], the trace of `inputs`, [*batch].
        outputs: E[dy dyᵀ], [*batch, out, out].
        gradient: ∂L/∂W, [*batch, out, in].
        rows: How many rows of x one example has, all uses together.
    """

    inputs: Array | None = None
    power: Array | None = None
    outputs: Array | None = None
    gradient: Array | None = None
    rows: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """What a calibration pass saw of a model.

    Attributes:
        moments: What it saw of each target, for every key that was asked for.
        notes: What could not be read, by name.
        examples: How many examples ran.
        loss: The mean loss over them; None where no gradient was wanted.
        dead: Keys that no gradient reaches, as far as gradients were wanted.
    """

    moments: Mapping[str, Moments]
    notes: tuple[str, ...] = ()
    examples: int = 0
    loss: float | None = None
    dead: tuple[str, ...] = ()


@dataclass
class Sums:
    """The running sums of one target; a statistic that a use does not have is not there."""

    total: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: Array, rows: int = 0) -> None:
        """Add one batch's sum over its rows."""
        wide = np.asarray(value, np.float64)
        self.total[name] = self.total[name] + wide if name in self.total else wide
        self.rows[name] = self.rows.get(name, 0) + rows

    def mean(self, name: str) -> Array | None:
        """The mean of a statistic over rows; None where no use has it."""
        value = self.total.get(name)
        return None if value is None else np.asarray(value / max(1, self.rows[name]))

    def moments(self, examples: int) -> Moments:
        """Means of what was added: of second moments over rows, of gradients over examples."""
        gradient = self.total.get("gradient")
        each = None if gradient is None else np.asarray(gradient / examples)
        rows = max(self.rows.values(), default=0) / max(1, examples)
        return Moments(self.mean("inputs"), self.mean("power"), self.mean("outputs"), each, rows)
