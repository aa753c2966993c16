"""truncate: reduce an adapter's ranks, and report the exact error.

Every s·b@a is split into singular triplets by QR of both factors (see svd.py); over all targets
‖ΔW − ΔW'‖² is then the sum of the σ² that are left out. One more rank of a target costs
(in + out)·batch elements, so triplets are taken in the order of σ²/cost. A stack of matrices has
one rank; its σ² are summed over the batch. Results have alpha = rank, that is scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lora_fx.adapter import svd
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.learning import LEARNS
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.svd import Triplets
from lora_fx.adapter.updates import Entry
from lora_fx.errors import LoraFxError, expect
from lora_fx.targets.rank_choice import gains, within_budget, within_loss
from lora_fx.text import Json, short, table

GOALS = ("rank", "params", "energy", "max_error", "max_abs_error")
SLACKS = (0.0, 1e-9, 1e-6, 1e-3, 0.1, 1.0)
"""Shares of the allowed squared error that are reserved for rounding, tried in this order."""


@dataclass(frozen=True)
class Truncated:
    """One truncated update: its rank, size and error.

    Attributes:
        key: The key of the update.
        before: Its old rank.
        after: Its new rank; 0 where it was removed.
        norm: The Frobenius norm ‖ΔW‖.
        error: The Frobenius norm ‖ΔW − ΔW'‖, with the rounding of a and b to fp32.
        saved: How many elements of a and b were taken away.
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
    """A truncated adapter and what it cost, as Frobenius norms over all updates together.

    Attributes:
        adapter: The truncated adapter.
        rows: The ranks and the error of each update.
        parameters: How many elements of a and b the adapter has.
    """

    adapter: Adapter
    rows: tuple[Truncated, ...]
    parameters: int

    __repr__ = short

    @property
    def norm(self) -> float:
        """The norm ‖ΔW‖ over all updates."""
        return math.hypot(*(row.norm for row in self.rows))

    @property
    def error(self) -> float:
        """The norm ‖ΔW − ΔW'‖ over all updates."""
        return math.hypot(*(row.error for row in self.rows))

    @property
    def relative(self) -> float:
        """‖ΔW − ΔW'‖/‖ΔW‖."""
        return self.error / self.norm

    @property
    def energy(self) -> float:
        """The share of Σ σ² that the kept ranks have."""
        return 1.0 - self.relative**2

    @property
    def parameters_before(self) -> int:
        """The number of elements of a and b before."""
        return self.parameters + sum(row.saved for row in self.rows)

    @property
    def dropped(self) -> int:
        """The number of removed ranks."""
        return sum(row.before - row.after for row in self.rows)

    @property
    def removed(self) -> tuple[str, ...]:
        """The keys of the updates that have no rank left."""
        return tuple(row.key for row in self.rows if not row.after)

    def to_json(self) -> Json:
        """The fields that `lora-fx truncate --json` adds to its object."""
        names = ("norm", "error", "relative", "energy", "parameters_before", "parameters")
        numbers = {name: getattr(self, name) for name in names}
        rows = [row.to_json() for row in self.rows]
        return {"truncated": rows, "removed": list(self.removed), **numbers}

    def __str__(self) -> str:
        """A table of the updates, for people."""
        rows: list[tuple[str, ...]] = [("key", "rank", "error", "relative")]
        for row in self.rows:
            ranks = f"{row.before} → {row.after}"
            rows.append((row.key, ranks, f"{row.error:.2e}", f"{row.relative:.2e}"))
        lines = table(rows)
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
    """Truncate an adapter to fewer ranks; give exactly one goal.

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
    expect(adapter, Adapter, "adapter", "an Adapter", "call truncate(load_adapter(path), rank=8)")
    goal_name, value = _goal(goal)
    updates = _updates(adapter)
    triplets = {}
    spectra = {}
    costs = {}
    for key, low in updates.items():
        triplets[key] = svd.product_svd(low.a, low.b * np.float64(low.scale))
        _, sigma, _ = triplets[key]
        spectra[key] = gains(sigma)
        costs[key] = _cost(low)
    norm = math.sqrt(math.fsum(float(squares.sum()) for squares in spectra.values()))
    if not norm:
        raise LoraFxError(
            "every ΔW of the adapter is zero; expected a trained one",
            "check that the adapter was trained",
        )

    built = partial(_built, adapter, triplets)
    ranks_within = partial(within_loss, spectra, costs)
    if goal_name == "rank":
        result = built({key: min(int(value), len(gain)) for key, gain in spectra.items()})
    elif goal_name == "params":
        result = built(within_budget(spectra, costs, int(value)))
    elif goal_name == "energy":
        result = built(ranks_within((1.0 - value) * norm * norm))
    else:
        bound = value * norm if goal_name == "max_error" else value
        tries = (built(ranks_within((1.0 - slack) * bound * bound)) for slack in SLACKS)
        within_bound = (attempt for attempt in tries if attempt.error <= bound)
        # Where rounding alone is more than the bound, the ranks stay.
        all_ranks = {key: low.rank for key, low in updates.items()}
        result = next(within_bound, None) or built(all_ranks)

    if not result.adapter.lowrank:
        if goal_name in ("max_error", "max_abs_error"):
            raise LoraFxError(
                f"{goal_name} {value:g} allows every rank to go",
                f"choose a smaller value; ‖ΔW‖ of all updates together is {norm:g}",
            )
        cheapest = min(costs, key=lambda key: costs[key])
        raise LoraFxError(
            f"{goal_name} {value:g} is too small to keep any rank; one rank of {cheapest!r} has "
            f"{costs[cheapest]} elements",
            "choose a larger value",
        )
    return result


def _cost(low: LowRank) -> int:
    """Return the number of elements that one rank of an update has."""
    return (low.a.size + low.b.size) // low.rank


def _goal(goals: Mapping[str, float | None]) -> tuple[str, float]:
    """Return the one goal that has a value; raise if it is not valid."""
    value_by_goal = {name: value for name, value in goals.items() if value is not None}
    if len(value_by_goal) != 1 or not set(value_by_goal) <= set(GOALS):
        options = ", ".join("--" + goal.replace("_", "-") for goal in GOALS)
        found = f"{' and '.join(value_by_goal)} are given together"
        if not value_by_goal:
            found = "no goal is given"
        raise LoraFxError(f"{found}; expected one goal", f"use one of {options}")
    name, value = next(iter(value_by_goal.items()))
    if name in ("rank", "params") and not _is_positive_whole(value):
        raise LoraFxError(
            f"{name} {value!r} is not a positive whole number", "pass 16, for example"
        )
    if name == "energy" and not 0.0 < value <= 1.0:
        raise LoraFxError(f"energy {value!r} is not in (0, 1]", "pass 0.99, for example")
    if not (math.isfinite(value) and value >= 0.0):
        raise LoraFxError(
            f"{name} {value!r} is not a number of 0 or more", "pass 0.01, for example"
        )
    return name, value


def _is_positive_whole(value: float) -> bool:
    return not isinstance(value, bool) and value == int(value) and value >= 1


def _updates(adapter: Adapter) -> dict[str, LowRank]:
    """Return the low-rank updates; raise LoraFxError if the adapter cannot be truncated."""
    for key, kind in adapter.others.items():
        raise LoraFxError(
            f"the adapter's {key!r} is {kind}; expected lora or rslora, because its singular "
            "values are not those of a product b @ a",
            "merge it into its model, and extract a new adapter from the result",
        )
    updates = adapter.lowrank
    if not updates:
        raise LoraFxError(
            "the adapter has no low-rank update", "pass an adapter with low-rank updates"
        )
    for key, low in updates.items():
        factors_are_finite = np.isfinite(low.a).all() and np.isfinite(low.b).all()
        if not factors_are_finite or not math.isfinite(low.scale):
            raise LoraFxError(
                f"{key!r} has NaN or infinite values",
                "training may have diverged; use an earlier checkpoint",
            )
    return updates


def _built(
    adapter: Adapter, triplets: Mapping[str, Triplets], ranks: Mapping[str, int]
) -> Truncation:
    """Return the adapter with these ranks, with each error measured."""
    entries: dict[str, Entry] = {}
    rows: list[Truncated] = []
    for key, entry in adapter.entries.items():
        if not isinstance(entry, LowRank):
            entries[key] = entry
            continue
        low, row = _truncated(key, entry, triplets[key], min(ranks[key], entry.rank))
        rows.append(row)
        if low is not None:
            entries[key] = low
    # How updates learn is a fact of the old ranks.
    metadata = {name: value for name, value in adapter.metadata.items() if name != LEARNS}
    truncated = replace(adapter, entries=entries, metadata=metadata)
    size = sum(low.a.size + low.b.size for low in truncated.lowrank.values())
    return Truncation(truncated, tuple(rows), size)


def _truncated(
    key: str, low: LowRank, triplets: Triplets, rank: int
) -> tuple[LowRank | None, Truncated]:
    """Return an update of this rank (None for rank 0), and its error."""
    u, sigma, vt = triplets
    norm = float(np.linalg.norm(sigma))
    saved = _cost(low) * (low.rank - rank)
    if rank == 0:
        return None, Truncated(key, low.rank, rank, norm, norm, saved)
    if rank == low.rank:
        unchanged = low
        if low.variant != "lora":
            # The same update with the plain scale: PEFT has one flag for the whole adapter.
            unchanged = replace(low, alpha=low.scale * low.rank, variant="lora")
        return unchanged, Truncated(key, low.rank, rank, norm, 0.0, saved)
    a, b = svd.balanced(u, sigma, vt, rank)
    error = svd.distance(low.a, low.b * np.float64(low.scale), a, b)
    truncated = replace(low, alpha=float(rank), variant="lora", frozen=0)
    return replace(truncated, a=a, b=b), Truncated(key, low.rank, rank, norm, error, saved)
