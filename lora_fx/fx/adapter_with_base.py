"""The conversion of an adapter's changes to whole tensors into the whole tensors of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import check_number, weight_hash
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.residual import on_base
from lora_fx.adapter.starts import matrix
from lora_fx.adapter.updates import Dense, ReplacedRows
from lora_fx.dtypes import Array
from lora_fx.fx.tensors import to_numpy
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.targets.found import Found


def with_base(adapter: Adapter, model: nn.Module) -> Adapter:
    """Return the adapter with ΔW given whole and trained rows turned into whole tensors.

    An update of a base that its start changed becomes an update of the stored base.
    """
    transposed = bool(adapter.metadata.get("fan_in_fan_out"))
    tensors = dict(model.named_parameters(remove_duplicate=False))
    entries = dict(adapter.entries)
    for key, entry in adapter.entries.items():
        if key not in tensors:
            continue
        if isinstance(entry, LowRank) and entry.mutated:
            stored = to_numpy(tensors[key])
            if transposed:
                stored = stored.T
            entries[key] = on_base(stored, entry, repr(key))
        elif isinstance(entry, ReplacedRows):
            value = to_numpy(tensors[key]).astype(np.float32)
            value[list(entry.index)] = entry.value
            entries[key] = Full(value, tied=True)  # one name alone has a tensor of its own here
        elif isinstance(entry, Dense):
            value = to_numpy(tensors[key]).astype(np.float32)
            delta = _as_stored(entry, value.shape, transposed=transposed)
            if delta is not None:
                entries[key] = Full(value + np.float32(entry.scale) * delta, tied=True)
    return replace(adapter, entries=entries)


def check_evaluated(adapter: Adapter, found: Found, read: Callable[[str], Array]) -> None:
    """Raise LoraFxError for updates that were evaluated on another base than a model.

    Args:
        adapter: Bound to the model.
        found: The model's targets.
        read: Gives a stored parameter of the model by name.
    """

    def hash_of(key: str) -> str:
        target = found[key]
        return weight_hash(matrix(target, read(target.parameter.name)))

    check_number(adapter, hash_of)


def _as_stored(entry: Dense, shape: tuple[int, ...], *, transposed: bool) -> Array | None:
    """Return ΔW as the parameter lies; None where the shape is another one.

    Args:
        entry: ΔW [out, in], [out, in, *kernel] or [out].
        shape: That of the parameter.
        transposed: The adapter says that its layers store [in, out].
    """
    delta = entry.value
    if entry.layout is None:
        if delta.ndim == 2 and transposed:
            delta = delta.T
        return delta if delta.shape == shape else None
    return entry.layout.to_stored(NumpyEmitter(), delta.reshape(entry.shape))
