"""The gain of one more rank of a target, by four methods, from a calibration's statistics.

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
    """Facts of one target that a method may use.

    Attributes:
        layout: The axes of the target.
        cost: The cost of one rank, in the unit of the budget.
        moments: The statistics of the pass; empty where the method reads none.
        weight: A function that reads W, [*batch, out, in].
    """

    layout: Layout
    cost: int
    moments: Moments
    weight: Callable[[], Array]


Gains = Callable[[TargetStatistics], Array | None]


class Method(NamedTuple):
    """A method to distribute ranks over targets.

    Attributes:
        wanted: The names in STATISTICS that it reads.
        gains: The gains of one target, [max_rank], or None where calibration could not read what
            it needs.
    """

    wanted: tuple[str, ...]
    gains: Gains


def eva(statistics: TargetStatistics) -> Array | None:
    """Return the share of E[x xᵀ] that each direction explains, [max_rank].

        gain_j = λ_j / Σλ,    λ of E[x xᵀ]

    Paischer et al. 2024, 2410.07170. EVA sorts these shares of all layers together and takes the
    largest; here they are taken per cost, as by the other methods, so that a budget is exact. x is
    not centred, as in the start `eva`.
    """
    inputs = statistics.moments.inputs
    if inputs is None:
        return None
    if inputs.ndim == 1:  # x is one-hot, and its diagonal is its spectrum
        rising = np.sort(inputs)
    else:
        rising = np.linalg.eigvalsh(inputs)
    falling = np.maximum(rising[..., ::-1], 0.0)
    spectrum = falling.reshape(-1, inputs.shape[-1]).sum(0)
    total = float(spectrum.sum())
    shares = spectrum / total if total else spectrum
    return np.asarray(shares[: statistics.layout.max_rank])


def importance(statistics: TargetStatistics) -> Array | None:
    """Return mean |W ∘ ∂L/∂W|, distributed as 1/j over the ranks, [max_rank].

        I = mean |W ∘ ∂L/∂W|        gain_j = I/j,    j = 1 …

    It says by how much the weight's own gradient would move it: He et al., GoRA, 2502.12171. ∂L/∂W
    is that of the mean loss over the data. GoRA gives every layer a share of the budget in
    proportion to I; greedy on I/j per cost does the same with whole ranks and an exact budget.
    GoRA's values of A and B are a start (`init`), and not part of this.
    """
    gradient = statistics.moments.gradient
    if gradient is None:
        return None
    mean = float(np.abs(statistics.weight() * gradient).mean())
    return mean / np.arange(1.0, statistics.layout.max_rank + 1)


def kfac(statistics: TargetStatistics) -> Array | None:
    """Return the Fisher information along each direction of the output, [max_rank].

        gain_j = T · λ_j(E[dy dyᵀ]) · tr E[x xᵀ],    λ_1 ≥ λ_2 ≥ …

    The Fisher information of W is about T · E[x xᵀ] ⊗ E[dy dyᵀ] (K-FAC: Martens and Grosse 2015,
    1503.05671), T the rows of x an example. Along the j-th direction of the output it holds gain_j:
    the mean square of the gradient that a row of rank one could take there. Rows are not averaged
    before they are squared, unlike in the spectrum of ∂L/∂W. A stack of matrices adds up over its
    batch.
    """
    moments = statistics.moments
    if moments.power is None or moments.outputs is None:
        return None
    falling = np.linalg.eigvalsh(moments.outputs)[..., ::-1]
    leading = np.maximum(falling[..., : statistics.layout.max_rank], 0.0)
    information = moments.rows * leading * moments.power[..., None]
    return np.asarray(information.reshape(-1, information.shape[-1]).sum(0))


def uniform(statistics: TargetStatistics) -> Array | None:
    """Return gains with which the j-th rank of every target is worth the same per cost.

        gain_j = cost/j,    j = 1 …

    Per cost that is 1/j for every target, so that every target gets its j-th rank before any gets
    its next; a target that is full leaves its share to the others. One rank for all targets is
    PEFT's default, and this project's. It reads no data.
    """
    return statistics.cost / np.arange(1.0, statistics.layout.max_rank + 1)


METHODS: Mapping[str, Method] = {
    "uniform": Method((), uniform),
    "importance": Method(("gradient",), importance),
    "kfac": Method(("power", "outputs"), kfac),
    "eva": Method(("inputs",), eva),
}
