"""The hash of an adapter: of all factors and scales, by key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, ReplacedRows, Rotation
from lora_fx.adapter.variant import variant_of

_HASHED: Mapping[type[Entry], tuple[str, ...]] = {
    LowRank: ("a", "b", "scale"),
    Full: ("value",),
    Hadamard: ("a1", "b1", "a2", "b2", "scale"),
    Kronecker: ("w1", "w2", "scale"),
    Rotation: ("turn",),
    Dense: ("value", "scale"),
    ReplacedRows: ("index", "value"),
}
"""The fields of an update that go into its adapter's hash, in order."""


def adapter_hash(adapter: Adapter) -> str:
    """Return a hash of all factors and scales, by key; file names and metadata do not count."""
    digest = hashlib.sha256()
    for key in sorted(adapter.entries):
        digest.update(key.encode() + b"\0")
        for name, value in _hashed(adapter.entries[key]):
            if isinstance(value, np.ndarray):
                digest.update(f"{value.dtype}{value.shape}".encode())
                if value.size:
                    digest.update(np.ascontiguousarray(value).view(np.uint8).data.cast("B"))
            elif value is not None:
                number = float(value) if name == "scale" else tuple(value)
                digest.update(repr(number).encode() + b"\0")
    return digest.hexdigest()


def _hashed(entry: Entry) -> Iterator[tuple[str, Any]]:
    """Yield the fields of an update that go into its adapter's hash, in order."""
    for name in _HASHED[type(entry)]:
        yield name, getattr(entry, name)
    if isinstance(entry, LowRank):
        yield from variant_of(entry).beside(entry).items()
