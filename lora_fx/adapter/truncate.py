"""truncate: an adapter of fewer ranks, with the exact error that it costs.

Every s·b@a is split into singular triplets by QR of both factors (see lowrank.py); over all targets
‖ΔW − ΔW'‖² is then the sum of the σ² that are left out. One more rank of a target costs
(in + out)·batch elements, so triplets are taken in the order of σ²/cost. A stack of matrices has
one rank; its σ² are summed over the batch. Results have alpha = rank, that is scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lora_fx.adapter import lowrank
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.base import plain
from lora_fx.adapter.lowrank import LowRank, Triplets
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, Rotation, is_plain, name_of
from lora_fx.adapter.variant import LEARNS, variant_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, expect
from lora_fx.targets.budget import gains, within_budget, within_loss
from lora_fx.text import Json, short, table

GOALS = ("rank", "params", "energy", "max_error", "max_abs_error")
SLACKS = (0.0, 1e-9, 1e-6, 1e-3, 0.1, 1.0)
"""Shares of a bound's square to leave to rounding: the first with which the error is within it."""


@dataclass(frozen=True)
class Truncated:
    """One update before and after.

    Attributes:
        key: The key of the update.
        before: Its old rank.
        after: Its new rank; 0 where it was removed.
        norm: The Frobenius norm ‖ΔW‖.
        error: The Frobenius norm ‖ΔW − ΔW'‖, with the rounding of a and b to fp32.
        saved: How many elements of a and b are gone.
    """

    key: str
    before: int
    after: int
    norm: float
    error: float
    saved: int

    @property
    def relative(self) -> float:
        """‖ΔW − ΔW'‖/‖ΔW‖; 0 for a ΔW of zeros."""
        return self.error / self.norm if self.norm else 0.0

    def to_json(self) -> Json:
        """One row of `truncated[]` in docs/json.md."""
        names = ("key", "before", "after", "norm", "error", "relative")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Truncation:
    """A truncated adapter and what it cost, as Frobenius norms over all updates together."""

    adapter: Adapter
    rows: tuple[Truncated, ...]
    parameters: int

    __repr__ = short

    @property
    def norm(self) -> float:
        """The norm ‖ΔW‖ over all updates."""
        return math.hypot(*(r.norm for r in self.rows))

    @property
    def error(self) -> float:
        """The norm ‖ΔW − ΔW'‖ over all updates."""
        return math.hypot(*(r.error for r in self.rows))

    @property
    def relative(self) -> float:
        """‖ΔW − ΔW'‖/‖ΔW‖."""
        return self.error / self.norm

    @property
    def energy(self) -> float:
        """The share of Σ σ² that is kept."""
        return 1.0 - self.relative**2

    @property
    def parameters_before(self) -> int:
        """How many elements of a and b there were."""
        return self.parameters + sum(r.saved for r in self.rows)

    @property
    def dropped(self) -> int:
        """How many ranks are gone."""
        return sum(r.before - r.after for r in self.rows)

    @property
    def removed(self) -> tuple[str, ...]:
        """Keys of which no rank is left."""
        return tuple(r.key for r in self.rows if not r.after)

    def to_json(self) -> Json:
        """The fields that `lora-fx truncate --json` adds to its object."""
        names = ("norm", "error", "relative", "energy", "parameters_before", "parameters")
        numbers = {name: getattr(self, name) for name in names}
        rows = [r.to_json() for r in self.rows]
        return {"truncated": rows, "removed": list(self.removed), **numbers}

    def __str__(self) -> str:
        """A table for people."""
        rows = [
            (r.key, f"{r.before} → {r.after}", f"{r.error:.2e}", f"{r.relative:.2e}")
            for r in self.rows
        ]
        lines = table([("key", "rank", "error", "relative"), *rows])
        lines += [f"removed: {key}" for key in self.removed]
        lines.append(f"{self.parameters} of {self.parameters_before} low-rank elements kept")
        lines.append(
            f"‖ΔW − ΔW'‖ = {self.error:.6e}, of ‖ΔW‖ = {self.norm:.6e}: {self.relative:.6e}; "
            f"energy kept {self.energy:.4%}"
        )
        return "\n".join(lines)


def truncate(
    adapter: Adapter,
    *,
    rank: int | None = None,
    params: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_abs_error: float | None = None,
) -> Adapter:
    """An adapter of fewer ranks; exactly one goal is given.

    Args:
        adapter: An adapter of lora or rslora updates; whole tensors are kept as they are.
        rank: No update has a higher rank than this.
        params: Elements of all a and b together, at most. Whole tensors are not counted.
        energy: Share of Σ σ² over all updates that is kept, at least; in (0, 1].
        max_error: ‖ΔW − ΔW'‖/‖ΔW‖ over all updates, at most.
        max_abs_error: ‖ΔW − ΔW'‖ over all updates, at most.

    Returns:
        Updates with alpha = rank and variant lora; an update that keeps its rank keeps its a and
        b. One that keeps no rank is not there: `truncation` says which, and has all errors.

    Raises:
        LoraFxError: No goal or several, DoRA and other entries that are no s·b@a, values that are
            not finite, a goal that leaves nothing.
    """
    return truncation(
        adapter, rank=rank, params=params, energy=energy,
        max_error=max_error, max_abs_error=max_abs_error,
    ).adapter  # fmt: skip


def truncation(adapter: Adapter, **goal: float | None) -> Truncation:
    """Truncate as `truncate` does, and report what every update lost."""
    expect(adapter, Adapter, "adapter", "an Adapter", "truncate(load_adapter(path), rank=8)")
    name, value = _goal(goal)
    updates = _updates(adapter)
    parts = {k: lowrank.product_svd(u.a, u.b * np.float64(u.scale)) for k, u in updates.items()}
    spectra = {k: gains(s) for k, (_, s, _) in parts.items()}
    costs = {k: (u.a.size + u.b.size) // u.rank for k, u in updates.items()}
    norm = math.sqrt(math.fsum(float(x.sum()) for x in spectra.values()))
    if not norm:
        raise LoraFxError(
            "every ΔW of the adapter is zero; expected a trained one", "was it trained?"
        )
    built, within = partial(_built, adapter, parts), partial(within_loss, spectra, costs)
    if name == "rank":
        result = built({k: min(int(value), len(x)) for k, x in spectra.items()})
    elif name == "params":
        result = built(within_budget(spectra, costs, int(value)))
    elif name == "energy":
        result = built(within((1.0 - value) * norm * norm))
    else:
        bound = value * norm if name == "max_error" else value
        unchanged = {k: u.rank for k, u in updates.items()}  # where rounding alone is more
        tries = (built(within((1.0 - slack) * bound * bound)) for slack in SLACKS)
        result = next((t for t in tries if t.error <= bound), None) or built(unchanged)
    if not result.adapter.lowrank:
        cheapest = min(costs, key=lambda k: costs[k])
        raise LoraFxError(
            f"{name} {value:g} leaves no rank of any update; one rank of {cheapest!r} is "
            f"{costs[cheapest]} elements",
            "allow more",
        )
    return result


def _goal(goal: Mapping[str, float | None]) -> tuple[str, float]:
    """The one goal that is given, checked."""
    given = {k: v for k, v in goal.items() if v is not None}
    if len(given) != 1 or not set(given) <= set(GOALS):
        raise LoraFxError(
            f"{len(given)} goals ({', '.join(given) or 'none'}); expected one",
            f"give one of {', '.join('--' + goal.replace('_', '-') for goal in GOALS)}",
        )
    name, value = next(iter(given.items()))
    whole = name in ("rank", "params")
    if whole and (isinstance(value, bool) or value != int(value) or value < 1):
        raise LoraFxError(f"{name} {value!r} is not a positive whole number", "16, for example")
    if name == "energy" and not 0.0 < value <= 1.0:
        raise LoraFxError(f"energy {value!r} is not in (0, 1]", "0.99, for example")
    if not (math.isfinite(value) and value >= 0.0):
        raise LoraFxError(f"{name} {value!r} is not a number from 0 up", "0.01, for example")
    return name, value


def _updates(adapter: Adapter) -> dict[str, LowRank]:
    for key, kind in adapter.others.items():
        raise LoraFxError(
            f"the adapter's {key!r} is {kind}; expected lora or rslora: its singular values are "
            "not those of a product b @ a",
            "merge it into its model, and extract an adapter from the result",
        )
    updates = adapter.lowrank
    if not updates:
        raise LoraFxError("the adapter has no low-rank update", "there is nothing to truncate")
    for key, u in updates.items():
        if not (np.isfinite(u.a).all() and np.isfinite(u.b).all() and math.isfinite(u.scale)):
            raise LoraFxError(f"{key!r} has NaN or infinite values", "training may have diverged")
    return updates


def _built(adapter: Adapter, parts: Mapping[str, Triplets], ranks: Mapping[str, int]) -> Truncation:
    """The adapter with these ranks, and every error as measured."""
    entries: dict[str, Entry] = {}
    rows: list[Truncated] = []
    for key, entry in adapter.entries.items():
        if not isinstance(entry, LowRank):
            entries[key] = entry
            continue
        new, (u, s, vt) = min(ranks[key], entry.rank), parts[key]
        saved = (entry.a.size + entry.b.size) // entry.rank * (entry.rank - new)
        norm = error = float(np.linalg.norm(s))
        if new == entry.rank:
            # The same update with the plain scale: PEFT has one flag for the whole adapter.
            unscaled = replace(entry, alpha=entry.scale * entry.rank, variant="lora")
            entries[key] = entry if entry.variant == "lora" else unscaled
            error = 0.0
        elif new:
            a, b = lowrank.balanced(u, s, vt, new)
            whole = replace(entry, alpha=float(new), variant="lora", frozen=0)
            entries[key] = replace(whole, a=a, b=b)
            error = lowrank.distance(entry.a, entry.b * np.float64(entry.scale), a, b)
        rows.append(Truncated(key, entry.rank, new, norm, error, saved))
    metadata = {k: v for k, v in adapter.metadata.items() if k != LEARNS}  # of the old ranks
    made = replace(adapter, entries=entries, metadata=metadata)
    size = sum(low.a.size + low.b.size for low in made.lowrank.values())
    return Truncation(made, tuple(rows), size)


# The singular values of every update of an adapter, and what else a page shows of one.
#
# s·b·a of rank k has k values, found from two k × k triangles: nothing of the size of W is formed.
# Those of a stack (experts, groups) are the values of all its matrices together, as if they were
# the blocks of one: Σσ² = ‖ΔW‖² holds for both.


MOST, FEW, MANY = 32, 10, 200
"""How many of the largest values are written of one update; FEW where there are over MANY."""


def summary(adapter: Adapter) -> list[Json]:
    """A row of {key, kind, rank, alpha, parameters, shape, sigma, norm} for every entry.

    `sigma` holds the largest values of s·b·a, descending, the first in six digits and the others
    in three; of DoRA this is the update before its rows are rescaled. It is None where the entry
    has no factors b and a.
    """
    most = MOST if len(adapter) <= MANY else FEW
    return [_row(key, entry, most) for key, entry in adapter.entries.items()]


def _row(key: str, entry: Entry, most: int) -> Json:
    arrays = [v for v in vars(entry).values() if isinstance(v, np.ndarray)]
    row: Json = {
        "key": key,
        "kind": name_of(entry),
        "rank": getattr(entry, "rank", None),
        "alpha": getattr(entry, "alpha", None),
        "parameters": sum(x.size for x in arrays),
        "shape": _shape(entry),
        "sigma": None,
    }
    if isinstance(entry, LowRank) and np.isfinite(entry.a).all() and np.isfinite(entry.b).all():
        values = abs(entry.scale) * lowrank.product_values(entry.a, entry.b)
        values = np.sort(values, axis=None)[::-1]
        total = float(np.sum(values**2))
        row["sigma"] = [float(f"{x:.{3 if i else 6}g}") for i, x in enumerate(values[:most])]
        row["norm"] = float(f"{total**0.5:.6g}")
    return row


def _shape(entry: Entry) -> list[int]:
    if isinstance(entry, LowRank):
        return list(entry.layout.stored if entry.layout is not None else entry.shape)
    return list(getattr(getattr(entry, "value", entry), "shape", ()))


# Any update as plain LoRA: ΔW by its method's formula, then the best b·a of few ranks.
#
# LoHa, LoKr and whole differences have a ΔW of their own. What reads W (DoRA's norm, a base that
# PiSSA or OLoRA changed) has it with the base: what a merge would add. ‖ΔW − b·a‖ is measured
# element by element. One matrix is held at a time, in fp32.


@dataclass(frozen=True)
class Approximated:
    """One update before and after: its kind, its new rank, ‖ΔW‖ and ‖ΔW − b·a‖."""

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
        """A line for people."""
        share = self.to_json()["relative"]
        return f"{self.key}: {self.kind} as rank {self.rank}, ‖ΔW − ΔW'‖/‖ΔW‖ = {share:.3e}"


def as_lora(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    delta_of: Callable[[Adapter], Array] | None = None,
) -> tuple[Adapter, list[Approximated]]:
    """An adapter whose updates of other methods are plain LoRA; plain ones and Full ones stay.

    Args:
        adapter: As a loader returned it.
        rank: Of each of them, at most.
        energy: Instead: each has the fewest ranks that hold this share of its ‖ΔW‖².
        delta_of: Makes the ΔW [out, in] of an adapter of one update that depends on its base:
            DoRA, and updates of a base that was changed.

    Raises:
        LoraFxError: Not one of rank and energy, an update that needs the base or has no ΔW, or a
            base that lacks its tensor.
    """
    if (rank is None) == (energy is None):
        raise LoraFxError("expected one of rank and energy", "for example --rank 16")
    if rank is not None and rank < 1:
        raise LoraFxError(f"rank is {rank}; expected 1 or more", "for example --rank 16")
    if energy is not None and not 0 < energy <= 1:
        raise LoraFxError(f"energy {energy} is not in (0, 1]", "0.99, for example")
    entries: dict[str, Entry] = {}
    rows: list[Approximated] = []
    for key, entry in adapter.entries.items():
        if isinstance(entry, LowRank) and is_plain(entry) and not variant_of(entry).peft_type:
            entries[key] = plain(entry)
            rows.append(Approximated(key, name_of(entry), entry.rank, entry.norm, 0.0))
            continue
        if is_plain(entry):
            entries[key] = entry
            continue
        delta = _delta(adapter, key, entry, delta_of)
        low = _best(delta, rank, energy)
        if isinstance(entry, LowRank):
            # Its numbers alone are others: where it applies, and how it lies there, stays.
            origin = replace(entry.origin, layer=None)
            low = replace(low, layout=entry.layout, use=entry.use, origin=origin)
        elif isinstance(entry, (Hadamard, Kronecker)):
            low = replace(low, origin=Origin(kernel=entry.kernel))
        entries[key] = low
        error = math.sqrt(lowrank.squared_distance(delta, low.a, low.b))
        norm = float(np.linalg.norm(delta.astype(np.float64)))
        rows.append(Approximated(key, name_of(entry), low.rank, norm, error))
    return replace(adapter, entries=entries), rows


def _delta(
    adapter: Adapter, key: str, entry: Entry, delta_of: Callable[[Adapter], Array] | None
) -> Array:
    """ΔW [out, in] of one update."""
    every = slice(None)
    if isinstance(entry, (Hadamard, Kronecker, Dense)):
        if min(entry.shape) < 2:
            raise LoraFxError(f"{key!r} is {name_of(entry)} of a vector: no matrix", "--exclude it")
        return entry.block(0, every, every)
    if not isinstance(entry, (LowRank, Rotation)):
        raise LoraFxError(f"{key!r} is {name_of(entry)}, which has no ΔW", "--exclude it")
    if delta_of is None:
        raise LoraFxError(
            f"{key!r} is {name_of(entry)}: its ΔW depends on the base", "--base FOLDER"
        )
    return delta_of(replace(adapter, entries={key: entry}))


def _best(delta: Array, rank: int | None, energy: float | None) -> LowRank:
    rng = np.random.default_rng(0)
    count = min(rank or 16, *delta.shape)
    total = float(np.square(delta, dtype=np.float64).sum())
    while True:
        u, s, vt = lowrank.leading(delta, count, rng)
        held = np.cumsum(np.square(s)) / total if total else np.ones(len(s))
        if energy is None or held[-1] >= energy or count == min(delta.shape):
            break
        count = min(4 * count, *delta.shape)
    if energy is not None:
        count = min(int(np.searchsorted(held, energy * (1 - 1e-12))) + 1, count)
    a, b = lowrank.balanced(u, s, vt, count)
    return LowRank(a, b, float(count))
