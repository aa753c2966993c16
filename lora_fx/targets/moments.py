"""Statistics of a calibration pass for each target, and their sums over batches.

x are the rows that a target's uses read, dy = ∂L/∂y the gradients at what they make, one row a
position: a token, a pixel with its kernel window, an id. Sums run over all batches in fp64. L is
the mean loss of the data; dy is taken of the loss of one example, N·∂L/∂y for a batch of N, so
that its size does not depend on how the data was cut into batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lora_fx.dtypes import Array

STATISTICS = ("inputs", "power", "outputs", "gradient")
"""The statistics that a calibration pass can collect; see Moments."""


WIDE = 16384
"""The longest side with a second moment: a longer side would take more than 2 GB in fp64."""


@dataclass(frozen=True)
class Moments:
    """Statistics of one target, in the axes [*batch, out, in] of its Layout.

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
    """The result of a calibration pass over a model.

    Attributes:
        moments: Key of each target that was asked for → its statistics.
        notes: Sentences on statistics that could not be read, by name.
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
    """The running sums of one target; a statistic that no use has is missing."""

    total: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: Array, rows: int = 0) -> None:
        """Add one batch's sum over its rows."""
        wide = np.asarray(value, np.float64)
        if name in self.total:
            wide = self.total[name] + wide
        self.total[name] = wide
        self.rows[name] = self.rows.get(name, 0) + rows

    def mean(self, name: str) -> Array | None:
        """Return the mean of a statistic over rows; None if no use has it."""
        value = self.total.get(name)
        if value is None:
            return None
        return np.asarray(value / max(1, self.rows[name]))

    def moments(self, examples: int) -> Moments:
        """Return the means: second moments over rows, gradients over examples."""
        gradient = self.total.get("gradient")
        if gradient is not None:
            gradient = np.asarray(gradient / examples)
        return Moments(
            inputs=self.mean("inputs"),
            power=self.mean("power"),
            outputs=self.mean("outputs"),
            gradient=gradient,
            rows=max(self.rows.values(), default=0) / max(1, examples),
        )
