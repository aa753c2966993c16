"""The fingerprint of the base that a module holds; see `lora_fx.checkpoint.provenance`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from lora_fx.checkpoint.provenance import (
    FIELD,
    Unknown,
    cast,
    compared,
    ends,
    fingerprint,
    parameters_of,
)
from lora_fx.dtypes import FLOATING, Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.tensors import is_sharded, to_numpy
from lora_fx.inputs import Named


class Base:
    """What an adapter says of the base that it is trained on.

    The last fingerprint is kept: tensors that are sharded later cannot be sampled by one process.
    """

    def __init__(self) -> None:
        self._keys: frozenset[str] = frozenset()
        self._last: dict[str, Any] = {}
        self._said: dict[str, str] = {}

    @property
    def said(self) -> tuple[str, ...]:
        """Notes on adapters whose base is another than this one, or cannot be compared."""
        return tuple(self._said.values())

    def check(
        self,
        metadata: Named,
        parameter: Callable[[str], torch.Tensor],
        name: str = "the adapter",
    ) -> None:
        """Compare the weights with those that an adapter says it was trained on, if it does.

        Args:
            metadata: Of the adapter.
            parameter: As in `now`.
            name: Of the adapter, for the note; one of the same name before is forgotten.
        """
        self._said.pop(name, None)
        recorded = metadata.get(FIELD)
        if recorded is None:
            return
        same, why = compared(recorded, lambda n, dtype: _cast_sample(n, dtype, parameter))
        if same is None:
            self._said[name] = f"{name}: its base is not verified: {why}"
        elif not same:
            count = len(recorded["names"])
            self._said[name] = (
                f"{name} was trained on other weights than this model's: samples of the {count} "
                "tensors that it changed there differ"
            )

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


def _cast_sample(
    name: str, dtype: str, parameter: Callable[[str], torch.Tensor]
) -> tuple[tuple[int, ...], Array]:
    try:
        _, shape, values = _sample(name, parameter(name))
    except LoraFxError as error:
        raise Unknown(error.message) from error
    if values.dtype.itemsize < numpy_dtype(dtype).itemsize:
        raise Unknown(f"{name!r} is {values.dtype} here and was {dtype}")
    return shape, cast(values, dtype)


def _sample(name: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...], Array]:
    if is_sharded(tensor):
        raise LoraFxError(f"{name!r} is sharded: every process would have to gather it")
    if dtype_name(tensor.dtype) not in FLOATING:
        raise LoraFxError(f"{name!r} is {tensor.dtype}, no dtype of plain weights")
    flat = tensor.detach().reshape(-1)
    both = [to_numpy(flat[part].clone()) for part in ends(len(flat))]
    return name, tuple(tensor.shape), np.concatenate(both)
