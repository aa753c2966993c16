"""The result of an extraction: an adapter, and how near each update is to its Δ."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.text import Json, short, table


@dataclass(frozen=True)
class Extracted:
    """The error of one update against its Δ. Norms are Frobenius norms.

    Attributes:
        key: The tensor's name.
        shape: As stored.
        rank: The rank of the update.
        norm: ‖Δ‖.
        base_norm: ‖W‖.
        error: ‖Δ − b@a‖.
        stable_rank: ‖Δ‖²/σ₁²; of a stack Σ‖Δ‖²/Σσ₁².
        above_noise: Singular values, of those computed, above what white noise would have (see
            lowrank.above_noise); the most of a stack.
        known: How many singular values were computed.
        enough: False where the cap kept `energy` from being reached.
    """

    key: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    base_norm: float
    error: float
    stable_rank: float
    above_noise: int
    known: int
    enough: bool = True

    @property
    def change(self) -> float | None:
        """‖Δ‖/‖W‖; None where W is zero."""
        if not self.base_norm:
            return None
        return self.norm / self.base_norm

    @property
    def relative(self) -> float:
        """‖Δ − b@a‖/‖Δ‖."""
        return self.error / self.norm

    def to_json(self) -> Json:
        """One row of `extracted[]` in docs/json.md."""
        return {
            "key": self.key,
            "shape": list(self.shape),
            "rank": self.rank,
            "norm": self.norm,
            "change": self.change,
            "error": self.error,
            "relative": self.relative,
            "stable_rank": self.stable_rank,
            "above_noise": self.above_noise,
            "known": self.known,
        }

    def cells(self) -> tuple[str, ...]:
        """One row of the table for people."""
        change = "-" if self.change is None else f"{self.change:.2e}"
        at_least = "≥ " if self.above_noise >= self.known else ""
        return (
            self.key,
            "×".join(map(str, self.shape)),
            str(self.rank),
            change,
            f"{self.relative:.2e}",
            f"{self.stable_rank:.1f}",
            f"{at_least}{self.above_noise}",
        )


Outcome = tuple[LowRank | Full | None, Extracted | None]
"""The update of a tensor, None where no element differs, and the row of a low-rank one."""


@dataclass(frozen=True)
class Extraction:
    """An extracted adapter and its report.

    Attributes:
        adapter: The adapter.
        rows: One for each low-rank update.
        unchanged: Tensors that are equal on both sides.
        left_out: Vectors that differ and are not in the adapter.
        skipped: How many tensors of base were not looked at.
    """

    adapter: Adapter
    rows: tuple[Extracted, ...]
    unchanged: tuple[str, ...]
    left_out: tuple[str, ...]
    skipped: int

    __repr__ = short

    @property
    def relative(self) -> float:
        """‖Δ − b@a‖/‖Δ‖ over all low-rank updates together."""
        norm = math.hypot(*(row.norm for row in self.rows))
        if not norm:
            return 0.0
        return math.hypot(*(row.error for row in self.rows)) / norm

    def to_json(self) -> Json:
        """The fields that `lora-fx extract --json` adds."""
        return {
            "extracted": [row.to_json() for row in self.rows],
            "whole": list(self.adapter.full),
            "left_out": list(self.left_out),
            "unchanged": len(self.unchanged),
            "skipped": self.skipped,
            "relative": self.relative,
            "parameters": self.adapter.parameters,
        }

    def __str__(self) -> str:
        """A table for people."""
        head = ("key", "shape", "rank", "‖Δ‖/‖W‖", "error/‖Δ‖", "stable rank", "above noise")
        lines = ["no low-rank update"]
        if self.rows:
            lines = table([head, *(row.cells() for row in self.rows)])
        lines += [f"whole: {key}" for key in self.adapter.full]
        lines.append(
            f"low-rank updates: {len(self.rows)}; equal tensors: {len(self.unchanged)}; "
            f"not compared: {self.skipped}; elements in the adapter: {self.adapter.parameters}"
        )
        lines.append(f"error over all updates: {self.relative:.6e} of ‖Δ‖")
        return "\n".join(lines)
