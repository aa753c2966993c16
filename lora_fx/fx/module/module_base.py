"""The fingerprint of the base that a module holds; see `lora_fx.checkpoint.provenance`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.checkpoint import base_fingerprint as checkpoint_fingerprint
from lora_fx.dtypes import FLOATING, Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.hub import origin
from lora_fx.fx.dotted_names import parameter_of
from lora_fx.fx.fake_tensors import is_wrapper
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.quantised_parameters import numbers
from lora_fx.fx.shards import is_sharded
from lora_fx.fx.tensors import to_numpy
from lora_fx.inputs import Named


class Base:
    """The record of the base that an adapter is trained on.

    The last fingerprint is kept: tensors that are sharded later cannot be sampled by one process.
    """

    def __init__(self) -> None:
        self._keys: frozenset[str] = frozenset()
        self._last: dict[str, Any] = {}
        self._said: dict[str, str] = {}

    @property
    def said(self) -> tuple[str, ...]:
        """Notes on adapters that were trained on another base, or whose base cannot be compared."""
        return tuple(self._said.values())

    def check(self, metadata: Named, root: nn.Module, name: str = "the adapter") -> None:
        """Compare the weights with the fingerprint in an adapter's metadata, if there is one.

        Args:
            metadata: The metadata of the adapter.
            root: The tree that holds the weights.
            name: The adapter's name, for the note; an earlier one of that name is forgotten.
        """
        self._said.pop(name, None)
        recorded = metadata.get(checkpoint_fingerprint.FIELD)
        if recorded is None:
            return
        same, why = checkpoint_fingerprint.compared(recorded, partial(_cast_sample, root))
        if same is None:
            self._said[name] = f"{name}: its base is not verified: {why}"
        elif not same:
            count = len(recorded["names"])
            self._said[name] = (
                f"{name} was trained on other weights than this model's: samples of the {count} "
                "tensors that it changed there differ"
            )

    def now(self, keys: Iterable[str], root: nn.Module) -> dict[str, Any]:
        """Return {"base": fingerprint} of the adapted weights; empty if these have no values.

        Args:
            keys: The keys of the adapter.
            root: The tree that holds the weights.
        """
        keys = frozenset(keys)
        fingerprint: dict[str, Any] = {}
        try:
            samples = [_sample(root, name) for name in checkpoint_fingerprint.parameters_of(keys)]
            if samples:
                fingerprint = {
                    checkpoint_fingerprint.FIELD: checkpoint_fingerprint.fingerprint(samples)
                }
        except LoraFxError:
            return self._last if keys == self._keys else {}
        self._keys = keys
        self._last = fingerprint
        return fingerprint


def base_facts(model: nn.Module) -> dict[str, Any]:
    """Return the name of a base, its revision where it is from the Hub, and a sample of it.

    The sample is of all matrices of floats.
    """
    name = type(model).__name__
    facts: dict[str, Any] = {}
    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    if isinstance(folder, str) and folder:
        name = folder.rstrip("/").rpartition("/")[2]
        facts = dict(origin(folder))
        name = facts.pop(checkpoint_fingerprint.NAMED, name)
    matrices = [
        parameter_name
        for parameter_name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.is_floating_point()
    ]
    record = Base().now(matrices, model).get(checkpoint_fingerprint.FIELD)
    if record is not None:
        facts |= {"tensors": len(record["names"]), "sample": record["sample"]}
    return {"name": name, **facts}


def said_of_other_bases(adapters: Mapping[str, Named], root: nn.Module) -> list[str]:
    """Return a line for each adapter that was trained on other weights than a model's.

    An adapter that records no base, or one that cannot be compared, has no line.

    Args:
        adapters: The metadata of each adapter by its name.
        root: The tree that holds the weights.
    """
    lines = []
    for name, metadata in adapters.items():
        recorded = metadata.get(checkpoint_fingerprint.FIELD)
        is_same, _ = checkpoint_fingerprint.compared(recorded, partial(_cast_sample, root))
        if is_same is False:
            lines.append(
                f"{name} was trained on other weights than this model's: its effect here is not "
                "what it learnt"
            )
    return lines


def _cast_sample(root: nn.Module, name: str, dtype: str) -> tuple[tuple[int, ...], Array]:
    try:
        _, shape, values = _sample(root, name)
    except LoraFxError as error:
        raise checkpoint_fingerprint.Unknown(error.message) from error
    if values.dtype.itemsize < numpy_dtype(dtype).itemsize:
        raise checkpoint_fingerprint.Unknown(f"{name!r} is {values.dtype} here and was {dtype}")
    return shape, checkpoint_fingerprint.cast(values, dtype)


def _sample(root: nn.Module, name: str) -> tuple[str, tuple[int, ...], Array]:
    """Return name, shape, and first and last elements of a parameter; dequantise codes."""
    tensor: torch.Tensor = parameter_of(root, name)
    if is_sharded(tensor):
        raise LoraFxError(
            f"{name!r} is sharded: every process would have to gather it",
            "gather it before this call",
        )
    tensor = numbers(root, name)
    if dtype_name(tensor.dtype) not in FLOATING or is_wrapper(tensor.data):
        raise LoraFxError(
            f"{name!r} is {tensor.dtype}, not a plain weight", "cast it before this call"
        )
    return name, tuple(tensor.shape), both_ends(tensor)


def both_ends(tensor: torch.Tensor) -> Array:
    """Return the first and last elements of a tensor, as a fingerprint samples them."""
    flat = tensor.detach().reshape(-1)
    ends = [to_numpy(flat[end].clone()) for end in checkpoint_fingerprint.ends(len(flat))]
    return np.concatenate(ends)
