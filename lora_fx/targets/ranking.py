"""What one more rank of a target is worth, by four methods, from what a calibration pass saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.ir.layout import Layout

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
