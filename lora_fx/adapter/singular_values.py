"""The singular values of every update of an adapter, and other facts for the report page.

s·b·a of rank k has k values, found from two k × k triangles: nothing of the size of W is formed.
Those of a stack (experts, groups) are the values of all its matrices together, as if they were
the blocks of one: Σσ² = ‖ΔW‖² holds for both.
"""

from __future__ import annotations

import numpy as np

from lora_fx.adapter import svd
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry, name_of
from lora_fx.dtypes import Array
from lora_fx.text import Json

MOST = 32
"""The number of largest values that are written for one update."""
FEW = 10
"""The number that is written if the adapter has more than MANY updates."""
MANY = 200


def summary(adapter: Adapter) -> list[Json]:
    """A row of {key, kind, rank, alpha, parameters, shape, sigma, norm} for every entry.

    `sigma` holds the largest values of s·b·a, descending, the first in six digits and the others
    in three; of DoRA this is the update before its rows are rescaled. It is None where the entry
    has no factors b and a.
    """
    most = MOST if len(adapter) <= MANY else FEW
    return [_row(key, entry, most) for key, entry in adapter.entries.items()]


def _row(key: str, entry: Entry, most: int) -> Json:
    """The row of one entry, with at most so many singular values."""
    arrays = [value for value in vars(entry).values() if isinstance(value, np.ndarray)]
    row: Json = {
        "key": key,
        "kind": name_of(entry),
        "rank": getattr(entry, "rank", None),
        "alpha": getattr(entry, "alpha", None),
        "parameters": sum(array.size for array in arrays),
        "shape": _shape(entry),
        "sigma": None,
    }
    if isinstance(entry, LowRank) and np.isfinite(entry.a).all() and np.isfinite(entry.b).all():
        values = abs(entry.scale) * svd.product_values(entry.a, entry.b)
        values = np.sort(values, axis=None)[::-1]
        energy = float(np.sum(values**2))
        row["sigma"] = _rounded(values[:most])
        row["norm"] = float(f"{energy**0.5:.6g}")
    return row


def _rounded(values: Array) -> list[float]:
    """The first value in six digits, and the others in three."""
    rounded = [float(f"{value:.3g}") for value in values]
    if rounded:
        rounded[0] = float(f"{values[0]:.6g}")
    return rounded


def _shape(entry: Entry) -> list[int]:
    """The stored shape where it is known, else [*batch, out, in]."""
    if isinstance(entry, LowRank):
        shape = entry.shape if entry.layout is None else entry.layout.stored
        return list(shape)
    value = getattr(entry, "value", entry)
    return list(getattr(value, "shape", ()))
