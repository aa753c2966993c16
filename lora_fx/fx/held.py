"""What the tensors of an update say where a module holds them: did they move, how do they learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.lowrank import LowRank
from lora_fx.fx.tensors import to_numpy


def grouped(
    parameters: Iterable[nn.Parameter], rates: Mapping[int, float], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of what trains for an optimizer, one for each learning rate.

    Args:
        parameters: Of the module.
        rates: Learning rate by id of a parameter.
        lr: Of every other one.
        weight_decay: Of every group.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for p in parameters:
        if p.requires_grad:
            groups.setdefault(rates.get(id(p), lr), []).append(p)
    return [
        {"params": params, "lr": rate, "weight_decay": weight_decay}
        for rate, params in groups.items()
    ]


def moved(u: LowRank, held: Mapping[str, nn.Parameter]) -> bool:
    """Whether an update is other than zero."""
    a, b = held["a"], held["b"]
    if u.frozen:
        return not (torch.equal(a, held["a0"]) and torch.equal(b, -held["b0"]))
    size = held.get("magnitude")
    grown = size is not None and not np.array_equal(to_numpy(size), np.asarray(u.magnitude))
    return grown or (bool(a.any()) and bool(b.any()))
