"""Choose the ranks that are worth their elements: greedy on σ²/cost over all targets.

σ² fall within a target and its ranks cost the same, so the order never takes a rank before the
one above it. The choice is the best one where the goal falls on a step of the order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_fx.dtypes import Array


def gains(s: Array) -> Array:
    """σ² by rank, summed over the batch, without those that are rounding alone.

    `s` are singular values, [*batch, k].
    """
    matrices = s.reshape(-1, s.shape[-1])
    rounding = matrices.max(initial=0.0) * s.shape[-1] * np.finfo(np.float64).eps
    squares = np.where(matrices > rounding, matrices, 0.0) ** 2
    return np.trim_zeros(squares.sum(0), "b")


def _steps(spectra: Mapping[str, Array], costs: Mapping[str, int]) -> list[tuple[str, float]]:
    """Pairs (key, σ²) in the order in which ranks are taken, within a key from the first on."""
    steps: list[tuple[str, float]] = []
    for key, squares in spectra.items():
        steps += [(key, float(square)) for square in squares]
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
    """The first ranks in order that leave out at most `allowed` of Σ σ², without useless ones."""
    steps = _steps(spectra, costs)
    squares = np.array([square for _, square in steps])
    # losses[t] is Σ σ² without the first t steps.
    losses = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    count = int(np.argmax(losses <= max(allowed, 0.0)))
    ranks = dict.fromkeys(spectra, 0)
    for key, _ in steps[:count]:
        ranks[key] += 1

    # A cheap rank that was taken late may make another one needless.
    loss = float(losses[count])
    settled_keys: set[str] = set()
    for key, square in reversed(steps[:count]):
        if key not in settled_keys and loss + square <= allowed:
            ranks[key] -= 1
            loss += square
        else:
            settled_keys.add(key)
    return ranks
