"""Formulas of coordinates: affine numbers, and truths that are inequalities between them.

Coordinates count from the last axis, −1, −2 …, so that broadcasting renames none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LOWEST = -1e30
"""What adds at most this to a score removes it: −∞, and the lowest of float32 and bfloat16."""


@dataclass(frozen=True)
class Affine:
    """The number c + Σ n·i over the coordinates i; `k` holds (axis, n)."""

    c: float
    k: frozenset[tuple[int, float]] = frozenset()

    def plus(self, other: Affine, times: float = 1) -> Affine:
        """Self + times·other."""
        k = dict(self.k)
        for axis, n in other.k:
            k[axis] = k.get(axis, 0) + times * n
        return Affine(self.c + times * other.c, frozenset((a, n) for a, n in k.items() if n))

    def at(self, places: Mapping[int, Affine]) -> Affine:
        """The formula with coordinates replaced; those that are left out become 0."""
        result = Affine(self.c)
        for axis, n in self.k:
            result = result.plus(places.get(axis, Affine(0)), n)
        return result


def coordinate(axis: int, start: float = 0, step: float = 1) -> Affine:
    """The number start + step·i of one axis."""
    return Affine(start, frozenset({(axis, step)}))


@dataclass(frozen=True)
class Where:
    """True where every formula is ≤ 0.

    Attributes:
        every: Formulas of integers.
        never: The constant False.
        form: As what: bool, ones (the numbers 1 and 0) or open (0 and −∞, to add to scores).
    """

    every: frozenset[Affine] = frozenset()
    never: bool = False
    form: str = "bool"

    def at(self, places: Mapping[int, Affine]) -> Where:
        """With coordinates replaced."""
        return where((a.at(places) for a in self.every), self.never, self.form)

    def as_(self, form: str) -> Where:
        """The same truth in another form."""
        return Where(self.every, self.never, form)


Formula = Affine | Where


def where(every: Iterable[Affine], never: bool = False, form: str = "bool") -> Where:
    """The conjunction of inequalities; those that any coordinates ≥ 0 decide are left out."""
    every = frozenset(every)
    if never or any(a.c > 0 and all(n > 0 for _, n in a.k) for a in every):
        return Where(frozenset(), True, form)
    left = (a for a in every if a.c > 0 or any(n > 0 for _, n in a.k))
    return Where(frozenset(left), False, form)


def constant(truth: bool) -> Where:
    """True or False everywhere."""
    return Where(frozenset(), not truth)


def negated(truth: Where) -> Where | None:
    """The opposite, where that is a conjunction as well."""
    if truth.never or not truth.every:
        return constant(truth.never)
    if len(truth.every) > 1:
        return None
    (one,) = truth.every
    return where({Affine(1).plus(one, -1)})  # not a ≤ 0: 1 − a ≤ 0


def causal(diagonal: int = 0) -> Where:
    """True where j ≤ i + diagonal, for a query i and a key j on the last two axes."""
    return where({coordinate(-1).plus(coordinate(-2), -1).plus(Affine(-diagonal))})
