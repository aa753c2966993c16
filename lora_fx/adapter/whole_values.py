"""Changes of whole tensors, as the whole tensors that a base has with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import Dense, Entry, ReplacedRows
from lora_fx.dtypes import Array
from lora_fx.ir.numpy_emitter import NumpyEmitter


def as_whole_tensors(
    entries: Mapping[str, Entry],
    read: Callable[[str], Array | None],
    *,
    transposed: bool = False,
) -> dict[str, Entry]:
    """Return entries with a ΔW that is given whole, and trained rows, as whole tensors.

    Args:
        entries: Those of an adapter, with the keys of a base.
        read: Gives the base's tensor of a key as it is stored; None where it is not known, and the
            entry stays what it is.
        transposed: The adapter says that its layers store [in, out].
    """
    placed = dict(entries)
    for key, entry in entries.items():
        if not isinstance(entry, (Dense, ReplacedRows)):
            continue
        stored = read(key)
        if stored is None:
            continue
        value = stored.astype(np.float32)
        if isinstance(entry, ReplacedRows):
            value[list(entry.index)] = entry.value
            placed[key] = Full(value, tied=True)  # one name alone has a tensor of its own here
            continue
        delta = _as_stored(entry, value.shape, transposed=transposed)
        if delta is not None:
            placed[key] = Full(value + np.float32(entry.scale) * delta, tied=True)
    return placed


def _as_stored(entry: Dense, shape: tuple[int, ...], *, transposed: bool) -> Array | None:
    """Return ΔW as the parameter lies; None where the shape is another one.

    Args:
        entry: ΔW [out, in], [out, in, *kernel] or [out].
        shape: That of the parameter.
        transposed: As in `as_whole_tensors`.
    """
    delta = entry.value
    if entry.layout is None:
        if delta.ndim == 2 and transposed:
            delta = delta.T
        return delta if delta.shape == shape else None
    return entry.layout.to_stored(NumpyEmitter(), delta.reshape(entry.shape))
