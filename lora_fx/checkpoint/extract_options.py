"""The options of extract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_fx.errors import LoraFxError

RANK = 16


MAX_RANK = 128
"""The highest rank that `energy` may choose if no rank is given."""


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """The options of `extract`, checked when they are made."""

    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    also_full: bool = False
    allow_missing: bool = False
    fan_in_fan_out: bool | None = None
    seed: int = 0
    whole: str | Sequence[str] | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        """Raise for values out of range, and for options that exclude each other."""
        for name, value in (("rank", self.rank), ("max_rank", self.max_rank)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise LoraFxError(
                    f"{name} {value!r} is not a positive whole number", "pass 16, for example"
                )
        if self.energy is None:
            if self.max_rank is not None:
                raise LoraFxError(
                    "max_rank applies only with energy", "pass --energy 0.9, or --rank alone"
                )
            return
        if self.rank is not None:
            raise LoraFxError(
                "rank and energy exclude each other",
                "pass one of --rank and --energy; --max-rank limits the rank with --energy",
            )
        if not 0.0 < self.energy < 1.0:
            raise LoraFxError(
                f"energy {self.energy!r} is not between 0 and 1", "pass 0.9, for example"
            )

    @property
    def limit(self) -> int:
        """The given rank, or the highest rank that `energy` may choose."""
        if self.energy is not None:
            return MAX_RANK if self.max_rank is None else self.max_rank
        return RANK if self.rank is None else self.rank
