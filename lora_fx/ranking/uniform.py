"""uniform: one rank for all targets. PEFT's default, and this project's. Reads no data.

    gain_j = cost/j,    j = 1 …

per cost that is 1/j for every target, so that every target gets its j-th rank before any gets
its next; a target that is full leaves its share to the others.
"""

from __future__ import annotations

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.ranking.seen import Seen

WANTED: tuple[str, ...] = ()


def gains(seen: Seen) -> Array | None:
    """See the module's docstring; [max_rank]."""
    return seen.cost / np.arange(1.0, seen.layout.max_rank + 1)
