"""The share of an update that a weight keeps when the sum is rounded for storage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_fx.dtypes import Array


@dataclass
class Applied:
    """Sums over elements that compare an update Δ of W with the change W_new − W that was stored.

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
        """⟨W_new − W, Δ⟩/⟨Δ, Δ⟩: 1 if all of Δ was kept or Δ is zero; 0 if nothing was kept."""
        return self.along / self.delta if self.delta else 1.0
