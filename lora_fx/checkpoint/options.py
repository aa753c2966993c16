"""What a merge into a checkpoint is asked for; see `lora_fx.checkpoint.merge.merge`."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fx.dtypes import FLOATING
from lora_fx.errors import LoraFxError

HOWS = ("sum", "cat", "linear", "svd")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Which numbers a merge writes, and what it accepts; an object that exists is in order."""

    how: str = "sum"
    rank: int | None = None
    dtype: str | None = None
    allow_unused: bool = False
    untie: bool = False
    add: bool = False
    again: bool = False
    allow_missing: bool = False
    any_base: bool = False
    trust: bool = False

    def __post_init__(self) -> None:
        """Raise for a mix or dtype that is not known, and for a rank below 1."""
        if self.dtype not in (None, *FLOATING):
            raise LoraFxError(f"no dtype {self.dtype!r}", f"one of {', '.join(FLOATING)}")
        if self.how not in HOWS:
            raise LoraFxError(f"no mix {self.how!r}", f"the mixes are {', '.join(HOWS)}")
        if self.rank is not None and self.rank < 1:
            raise LoraFxError(f"rank is {self.rank}; expected 1 or more", "for example --rank 16")
