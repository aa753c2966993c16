"""Statistics of how a fold changed the elements of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_fx.adapter.applied import Applied
from lora_fx.checkpoint.stored_rows import Space
from lora_fx.dtypes import Array


@dataclass
class Stats(Applied):
    """Statistics of the elements that a fold changed, as sums that add up over blocks.

    Attributes:
        elements: How many.
        still: Those that did not move.
        weight: ‖W‖².
        error: ‖W + Δ − W_new‖² of a weight that is quantised anew.
        own: What quantising W itself is taken to have cost, squared: step²/12 an element.
    """

    elements: int = 0
    still: int = 0
    weight: float = 0.0
    error: float = 0.0
    own: float = 0.0

    def add(self, other: Stats) -> None:
        """Add the sums of another block."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def ratio(self) -> float:
        """‖Δ‖/‖W‖; 0 where there is no Δ."""
        if not self.delta:
            return 0.0
        if not self.weight:
            return float("inf")
        return float(np.sqrt(self.delta / self.weight))

    @property
    def missed(self) -> float | None:
        """‖W + Δ − W_new‖/‖Δ‖ of a weight that is quantised again; None if Δ is zero."""
        if not self.delta:
            return None
        return float(np.sqrt(self.error / self.delta))

    @property
    def coarse(self) -> float | None:
        """The error that quantising W is taken to have made, over ‖W‖; None for a W of zeros."""
        if not self.weight:
            return None
        return float(np.sqrt(self.own / self.weight))

    @property
    def lost(self) -> float:
        """Share of elements that did not move."""
        if not self.elements:
            return 0.0
        return self.still / self.elements


def measured(stored: Array, weight: Array, delta: Array, result: Array, space: Space) -> Stats:
    """The sums of a block that was folded.

    Args:
        stored: The rows as stored.
        weight: The same in the dtype that was folded in.
        delta: Δ.
        result: The new rows as stored.
        space: The calling thread's; what it has as "new", W + Δ, is not needed any more.
    """
    applied = space.array("new", weight.shape, weight.dtype)
    np.copyto(applied, result)
    differs = space.array("differs", weight.shape, np.dtype(bool))
    if stored.dtype == result.dtype and stored.dtype.itemsize == 2:
        np.not_equal(stored.view(np.uint16), result.view(np.uint16), out=differs)
    else:
        np.not_equal(weight, applied, out=differs)
    still = stored.size - np.count_nonzero(differs)
    np.subtract(applied, weight, out=applied)
    return stats_of(weight, delta, applied, int(still))


def stats_of(weight: Array, delta: Array, moved: Array, still: int) -> Stats:
    """The sums of a block: W, Δ, W_new − W, and how many elements did not move."""
    stats = Stats(elements=weight.size, still=still, weight=float(np.vdot(weight, weight)))
    stats.count(moved, np.ascontiguousarray(delta))
    return stats
