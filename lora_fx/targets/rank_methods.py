"""What one more rank of a target is worth, by four methods, from what a calibration pass saw.

A method says what one more rank of a target is worth: gains by rank, none larger than the one
before it. `lora_fx.targets.budget` spends a budget on them, the largest gain per cost first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.ir.layout import Layout
from lora_fx.targets.moments import Moments


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
