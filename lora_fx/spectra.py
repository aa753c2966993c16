"""The singular values of every update of an adapter, and what else a page shows of one.

s·b·a of rank k has k values, found from two k × k triangles: nothing of the size of W is formed.
Those of a stack (experts, groups) are the values of all its matrices together, as if they were the
blocks of one: Σσ² = ‖ΔW‖² holds for both.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_fx.adapter import Adapter
from lora_fx.changes import Entry, name_of
from lora_fx.lowrank import LowRank
from lora_fx.svd import product_values

MOST, FEW, MANY = 32, 10, 200
"""Values that are written of one update, the largest; and of each of more than MANY."""


def summary(adapter: Adapter) -> list[dict[str, Any]]:
    """A row of {key, kind, rank, alpha, parameters, shape, sigma, norm} for every entry.

    `sigma` holds the largest values of s·b·a, descending, the first in six digits and the others
    in three; of DoRA this is the update before its rows are rescaled. It is None where the entry
    has no factors b and a.
    """
    most = MOST if len(adapter) <= MANY else FEW
    return [_row(key, entry, most) for key, entry in adapter.entries.items()]


def _row(key: str, entry: Entry, most: int) -> dict[str, Any]:
    arrays = [v for v in vars(entry).values() if isinstance(v, np.ndarray)]
    row: dict[str, Any] = {
        "key": key,
        "kind": name_of(entry),
        "rank": getattr(entry, "rank", None),
        "alpha": getattr(entry, "alpha", None),
        "parameters": sum(x.size for x in arrays),
        "shape": _shape(entry),
        "sigma": None,
    }
    if isinstance(entry, LowRank) and np.isfinite(entry.a).all() and np.isfinite(entry.b).all():
        values = np.sort(abs(entry.scale) * product_values(entry.a, entry.b), axis=None)[::-1]
        total = float(np.sum(values**2))
        row["sigma"] = [float(f"{x:.{3 if i else 6}g}") for i, x in enumerate(values[:most])]
        row["norm"] = float(f"{total**0.5:.6g}")
    return row


def _shape(entry: Entry) -> list[int]:
    if isinstance(entry, LowRank):
        return list(entry.layout.stored if entry.layout is not None else entry.shape)
    value = getattr(entry, "value", None)
    return list(value.shape) if value is not None else list(getattr(entry, "shape", ()))
