"""The fingerprint of the base that a module holds; see `lora_fx.checkpoint.fingerprint`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from lora_fx.checkpoint.fingerprint import FIELD, ends, fingerprint, parameters_of
from lora_fx.checkpoint.headers import WEIGHTS
from lora_fx.errors import LoraFxError
from lora_fx.fx.tensors import to_numpy
from lora_fx.lowrank import Array


class Base:
    """What an adapter says of the base that it is trained on.

    The last fingerprint is kept: tensors that are sharded later cannot be sampled by one process.
    """

    def __init__(self) -> None:
        self._keys: frozenset[str] = frozenset()
        self._last: dict[str, Any] = {}

    def now(self, keys: Iterable[str], parameter: Callable[[str], torch.Tensor]) -> dict[str, Any]:
        """{"base": fingerprint} of the weights of low-rank keys; empty where they have no values.

        Args:
            keys: Of the adapter.
            parameter: Name of a parameter → the frozen tensor; raises LoraFxError for others.
        """
        keys = frozenset(keys)
        try:
            samples = [_sample(name, parameter(name)) for name in parameters_of(keys)]
            found = {FIELD: fingerprint(samples)} if samples else {}
        except LoraFxError:
            return self._last if keys == self._keys else {}
        self._keys, self._last = keys, found
        return found


def _sample(name: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...], Array]:
    if hasattr(tensor, "full_tensor"):
        raise LoraFxError(f"{name!r} is sharded: every process would have to gather it")
    if str(tensor.dtype).removeprefix("torch.") not in WEIGHTS:
        raise LoraFxError(f"{name!r} is {tensor.dtype}, no dtype of plain weights")
    both = [to_numpy(part) for part in ends(tensor.detach().reshape(-1))]
    return name, tuple(tensor.shape), np.concatenate(both)
