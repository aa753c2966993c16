"""Conversion of any update to plain LoRA: compute ΔW, then its best low-rank approximation b·a.

LoHa, LoKr and whole differences have a ΔW of their own. What reads W (DoRA's norm, a base that
PiSSA or OLoRA changed) has it with the base: what a merge would add. ‖ΔW − b·a‖ is measured
element by element. One matrix is held at a time, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter import svd
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, Rotation, is_plain, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.adapter.variant_protocol import plain
from lora_fx.adapter.vera import refuse_unknown_inputs
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.text import Json


@dataclass(frozen=True)
class Approximated:
    """One approximated update: its kind, its new rank, ‖ΔW‖ and ‖ΔW − b·a‖."""

    key: str
    kind: str
    rank: int
    norm: float
    error: float

    def to_json(self) -> Json:
        """A row of `approximated[]` in docs/json.md."""
        relative = self.error / self.norm if self.norm else 0.0
        return {**vars(self), "relative": relative}

    def __str__(self) -> str:
        """One line of text for people."""
        share = self.to_json()["relative"]
        return f"{self.key}: {self.kind} as rank {self.rank}, ‖ΔW − ΔW'‖/‖ΔW‖ = {share:.3e}"


def as_lora(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    delta_of: Callable[[Adapter], Array] | None = None,
) -> tuple[Adapter, list[Approximated]]:
    """Approximate updates of other methods by plain LoRA; keep plain and Full updates unchanged.

    Args:
        adapter: As a loader returned it.
        rank: Of each of them, at most.
        energy: Instead: each has the fewest ranks that hold this share of its ‖ΔW‖².
        delta_of: Makes the ΔW [out, in] of an adapter of one update that depends on its base:
            DoRA, and updates of a base that was changed.

    Raises:
        LoraFxError: None or both of rank and energy, an update that needs the base or has no ΔW, or
            a base that lacks its tensor.
    """
    if rank is None and energy is None:
        raise LoraFxError("expected one of rank and energy", "pass --rank 16, for example")
    if rank is not None and energy is not None:
        raise LoraFxError(
            "both rank and energy are given; expected one of them",
            "pass --rank 16 alone, for example",
        )
    if rank is not None and rank < 1:
        raise LoraFxError(f"rank is {rank}; expected 1 or more", "pass --rank 16, for example")
    if energy is not None and not 0 < energy <= 1:
        raise LoraFxError(f"energy {energy} is not in (0, 1]", "pass --energy 0.99, for example")
    refuse_unknown_inputs(adapter.entries, adapter.metadata, "another form")
    entries: dict[str, Entry] = {}
    rows: list[Approximated] = []
    for key, entry in adapter.entries.items():
        if isinstance(entry, LowRank) and is_plain(entry) and not variant_of(entry).peft_type:
            # Only its name is another than LoRA's.
            entries[key] = plain(entry)
            rows.append(Approximated(key, name_of(entry), entry.rank, entry.norm, 0.0))
        elif is_plain(entry):
            entries[key] = entry
        else:
            delta = _delta(adapter, key, entry, delta_of)
            low = _of_entry(_best(delta, rank, energy), entry)
            error = math.sqrt(svd.squared_distance(delta, low.a, low.b))
            norm = float(np.linalg.norm(delta.astype(np.float64)))
            entries[key] = low
            rows.append(Approximated(key, name_of(entry), low.rank, norm, error))
    return replace(adapter, entries=entries), rows


def _of_entry(low: LowRank, entry: Entry) -> LowRank:
    """Return `low` with the layout, use and origin of the entry that it approximates."""
    if isinstance(entry, LowRank):
        # Where it applies, and how it lies there, stays.
        origin = replace(entry.origin, layer=None)
        return replace(low, layout=entry.layout, use=entry.use, origin=origin)
    if isinstance(entry, (Hadamard, Kronecker)):
        return replace(low, origin=Origin(kernel=entry.kernel))
    return low


def _delta(
    adapter: Adapter, key: str, entry: Entry, delta_of: Callable[[Adapter], Array] | None
) -> Array:
    """Return ΔW [out, in] of one update."""
    if isinstance(entry, (Hadamard, Kronecker, Dense)):
        if min(entry.shape) < 2:
            raise LoraFxError(
                f"{key!r} is {name_of(entry)} of a vector; expected a matrix",
                "pass --exclude to leave it out",
            )
        return entry.block(0, slice(None), slice(None))
    if not isinstance(entry, (LowRank, Rotation)):
        raise LoraFxError(
            f"{key!r} is {name_of(entry)}, which has no ΔW", "pass --exclude to leave it out"
        )
    if delta_of is None:
        raise LoraFxError(
            f"{key!r} is {name_of(entry)}: its ΔW depends on the base",
            "pass the base with --base FOLDER",
        )
    return delta_of(replace(adapter, entries={key: entry}))


def _best(delta: Array, rank: int | None, energy: float | None) -> LowRank:
    """Return the best update of at most `rank`, or of the fewest ranks with this share of ‖ΔW‖²."""
    rng = np.random.default_rng(0)
    total = float(np.square(delta, dtype=np.float64).sum())
    count = min(rank or 16, *delta.shape)
    while True:
        u, sigma, vt = svd.leading(delta, count, rng)
        shares = np.ones(len(sigma))  # of the energy, in the first ranks
        if total:
            shares = np.cumsum(np.square(sigma)) / total
        if energy is None or shares[-1] >= energy or count == min(delta.shape):
            break
        count = min(4 * count, *delta.shape)
    if energy is not None:
        fewest = int(np.searchsorted(shares, energy * (1 - 1e-12))) + 1
        count = min(fewest, count)
    a, b = svd.balanced(u, sigma, vt, count)
    return LowRank(a, b, float(count))
