"""The share of an update that a stored weight keeps: one measure for every fold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_fx.dtypes import Array


@dataclass
class Applied:
    """An update Δ of a weight W and what storing W + Δ as W_new made of it, as sums over elements.

    Blocks of a weight add up.

    Attributes:
        delta: ‖Δ‖², Δ = what should have been added.
        along: ⟨W_new − W, Δ⟩.
    """

    delta: float = 0.0
    along: float = 0.0

    def count(self, moved: Array, delta: Array) -> None:
        """Add the elements of a block: W_new − W and Δ, of one shape."""
        self.delta += float(np.vdot(delta, delta).real)
        self.along += float(np.vdot(moved, delta).real)

    @property
    def gain(self) -> float:
        """⟨W_new − W, Δ⟩/⟨Δ, Δ⟩: 1 if all of Δ was kept, or Δ is zero; 0 if nothing was kept."""
        return self.along / self.delta if self.delta else 1.0
