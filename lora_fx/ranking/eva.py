"""eva: how much of a target's input each direction explains. Paischer et al. 2024, 2410.07170.

    gain_j = λ_j / Σλ,    λ of E[x xᵀ]

EVA sorts these shares of all layers together and takes the largest; here they are taken per cost,
as by the other methods, so that a budget is exact. x is not centred, as in the start `eva`.
"""

from __future__ import annotations

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.ranking.seen import Seen

WANTED = ("inputs",)


def gains(seen: Seen) -> Array | None:
    """See the module's docstring; [max_rank]."""
    inputs = seen.moments.inputs
    if inputs is None:
        return None
    one_hot = inputs.ndim == 1  # then its diagonal is its spectrum
    rising = np.sort(inputs) if one_hot else np.linalg.eigvalsh(inputs)
    every = np.maximum(rising[..., ::-1], 0.0).reshape(-1, inputs.shape[-1]).sum(0)
    total = float(every.sum())
    return np.asarray((every / total if total else every)[: seen.layout.max_rank])
