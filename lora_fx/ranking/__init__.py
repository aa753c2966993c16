"""Ways to decide which target deserves which rank, one a file; the algorithm is its docstring.

A method says what one more rank of a target is worth: gains by rank, none larger than the one
before it. `lora_fx.budget` spends a budget on them, the largest gain per cost first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from lora_fx.dtypes import Array
from lora_fx.ranking import eva, importance, kfac, uniform
from lora_fx.ranking.seen import Seen

Gains = Callable[[Seen], Array | None]


class Method(NamedTuple):
    """One way.

    Attributes:
        wanted: What it reads, of lora_fx.moments.STATISTICS.
        gains: Of one target, [max_rank]; None where calibration could not read what it needs.
    """

    wanted: tuple[str, ...]
    gains: Gains


METHODS: Mapping[str, Method] = {
    "uniform": Method(uniform.WANTED, uniform.gains),
    "importance": Method(importance.WANTED, importance.gains),
    "kfac": Method(kfac.WANTED, kfac.gains),
    "eva": Method(eva.WANTED, eva.gains),
}
