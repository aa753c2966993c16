"""kfac: how much gradient falls on each direction of a target's output.

    gain_j = T · λ_j(E[dy dyᵀ]) · tr E[x xᵀ],    λ_1 ≥ λ_2 ≥ …

The Fisher information of W is about T · E[x xᵀ] ⊗ E[dy dyᵀ] (K-FAC: Martens and Grosse 2015,
1503.05671), T the rows of x an example. Along the j-th direction of the output it holds gain_j: the
mean square of the gradient that a row of rank one could take there. Rows are not averaged before
they are squared, unlike in the spectrum of ∂L/∂W. A stack of matrices adds up over its batch.
"""

from __future__ import annotations

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.ranking.seen import Seen

WANTED = ("power", "outputs")


def gains(seen: Seen) -> Array | None:
    """See the module's docstring; [max_rank]."""
    power, outputs, rows = seen.moments.power, seen.moments.outputs, seen.moments.rows
    if power is None or outputs is None:
        return None
    falling = np.linalg.eigvalsh(outputs)[..., ::-1][..., : seen.layout.max_rank]
    every = rows * np.maximum(falling, 0.0) * power[..., None]
    return np.asarray(every.reshape(-1, every.shape[-1]).sum(0))
