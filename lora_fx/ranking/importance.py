"""importance: by how much the weight's own gradient would move it. He et al., GoRA, 2502.12171.

    I = mean |W ∘ ∂L/∂W|        gain_j = I/j,    j = 1 …

∂L/∂W is that of the mean loss over the data. GoRA gives every layer a share of the budget in
proportion to I; greedy on I/j per cost does the same with whole ranks and an exact budget.
GoRA's values of A and B are a start (`init`), and not part of this.
"""

from __future__ import annotations

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.ranking.seen import Seen

WANTED = ("gradient",)


def gains(seen: Seen) -> Array | None:
    """See the module's docstring; [max_rank]."""
    gradient = seen.moments.gradient
    if gradient is None:
        return None
    importance = float(np.abs(seen.weight() * gradient).mean())
    return importance / np.arange(1.0, seen.layout.max_rank + 1)
