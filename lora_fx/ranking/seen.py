"""What a method knows of one target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_fx.dtypes import Array
from lora_fx.ir.layout import Layout
from lora_fx.moments import Moments


@dataclass(frozen=True)
class Seen:
    """One target.

    Attributes:
        layout: Its axes.
        cost: Of one rank, in the unit of the budget.
        moments: What calibration saw; empty where the method wanted nothing.
        weight: Reads W, [*batch, out, in].
    """

    layout: Layout
    cost: int
    moments: Moments
    weight: Callable[[], Array]
