"""The sizes that a program takes, and those that should be free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_fx.conditions import Condition, Size, SizeError
from lora_fx.fx.capture.call import leaves_of
from lora_fx.inputs import Named

Requested = Mapping[str, Mapping[int, str]]
"""What should be dynamic: leaf name → {dimension: symbol name}."""


@dataclass(frozen=True)
class Door:
    """The sizes that a program takes.

    Attributes:
        names: Names of the leaves.
        sizes: For each tensor leaf, the fixed size of each dimension, or None for any.
        conditions: What the free sizes have to satisfy.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[int | None, ...] | None, ...]
    conditions: tuple[Condition, ...] = ()

    def refused(self, leaves: Sequence[Any]) -> SizeError | None:
        """The error that names the input whose size does not fit; None where all do.

        In plain loops, which torch.compile traces.
        """
        for name, want, leaf in zip(self.names, self.sizes, leaves, strict=True):
            for i, n in enumerate(want or ()):
                if n is not None and leaf.shape[i] != n:
                    return SizeError(
                        f"{name}: captured for sizes {list(want or ())} (None = any), "
                        f"got {list(leaf.shape)}",
                        "give such sizes, or capture with this dimension dynamic",
                    )
        for condition in self.conditions:
            given = self.given(condition, leaves)
            if not condition.holds(given):
                return condition.refusal(given)
        return None

    def free(self, requested: Requested) -> dict[str, dict[int, str]]:
        """Name of a tensor leaf → {dimension: symbol} of what should be dynamic and is."""
        return {
            name: {d: s for d, s in requested.get(name, {}).items() if fixed[d] is None}
            for name, fixed in zip(self.names, self.sizes, strict=True)
            if fixed is not None
        }

    def fixed(self, requested: Requested) -> dict[Size, int]:
        """The sizes that should be dynamic and are not."""
        held = ((n, fixed) for n, fixed in zip(self.names, self.sizes, strict=True) if fixed)
        pairs = ((n, d, fixed) for n, fixed in held for d in requested.get(n, {}) if d < len(fixed))
        return {(n, d): size for n, d, fixed in pairs if (size := fixed[d]) is not None}

    def check(self, leaves: Sequence[Any]) -> None:
        """Raise what refused gives."""
        error = self.refused(leaves)
        if error is not None:
            raise error

    def admits(self, leaves: Sequence[Any]) -> bool:
        """Whether all sizes fit."""
        return self.refused(leaves) is None

    def given(self, condition: Condition, leaves: Sequence[Any]) -> dict[Size, int]:
        """The sizes that a condition speaks of."""
        return {(n, d): leaves[self.names.index(n)].shape[d] for _, n, d in condition.sizes}


def ones_of(named: Named, requested: Requested) -> list[tuple[str, int]]:
    """(leaf name, dimension) of what should be dynamic and has size 1."""
    leaves = dict(leaves_of(named))
    return [
        (n, d)
        for n, dims in requested.items()
        for d in dims
        if isinstance(x := leaves.get(n), torch.Tensor) and d < x.dim() and x.shape[d] == 1
    ]


def less(requested: Requested, fixed: Collection[tuple[str, int]]) -> Requested:
    """What should be dynamic, but for these dimensions, which become fixed."""
    return {
        n: {d: s for d, s in dims.items() if (n, d) not in fixed} for n, dims in requested.items()
    }
