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
"""The dimensions that should be dynamic: leaf name → {dimension: symbol name}."""


@dataclass(frozen=True)
class Door:
    """The sizes that a program takes.

    Attributes:
        names: Names of the leaves.
        sizes: For each tensor leaf, the fixed size of each dimension, or None for any.
        conditions: Conditions that the free sizes have to satisfy.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[int | None, ...] | None, ...]
    conditions: tuple[Condition, ...] = ()

    def refused(self, leaves: Sequence[Any]) -> SizeError | None:
        """The error that names the input whose size does not fit; None where all do.

        In plain loops, which torch.compile traces.
        """
        for name, fixed_sizes, leaf in zip(self.names, self.sizes, leaves, strict=True):
            for dim, size in enumerate(fixed_sizes or ()):
                if size is not None and leaf.shape[dim] != size:
                    return SizeError(
                        f"{name}: captured for sizes {list(fixed_sizes or ())} (None = any), "
                        f"got {list(leaf.shape)}",
                        "pass inputs of these sizes, or capture with this dimension dynamic",
                    )
        for condition in self.conditions:
            sizes = self.given(condition, leaves)
            if not condition.holds(sizes):
                return condition.refusal(sizes)
        return None

    def free(self, requested: Requested) -> dict[str, dict[int, str]]:
        """Name of a tensor leaf → {dimension: symbol} of those that should be dynamic and are."""
        free_dims: dict[str, dict[int, str]] = {}
        for name, fixed_sizes in zip(self.names, self.sizes, strict=True):
            if fixed_sizes is None:
                continue
            symbols = requested.get(name, {})
            free_dims[name] = {
                dim: symbol for dim, symbol in symbols.items() if fixed_sizes[dim] is None
            }
        return free_dims

    def fixed(self, requested: Requested) -> dict[Size, int]:
        """The sizes that should be dynamic and are not."""
        fixed: dict[Size, int] = {}
        for name, fixed_sizes in zip(self.names, self.sizes, strict=True):
            for dim in requested.get(name, {}):
                if fixed_sizes is None or dim >= len(fixed_sizes):
                    continue
                size = fixed_sizes[dim]
                if size is not None:
                    fixed[name, dim] = size
        return fixed

    def check(self, leaves: Sequence[Any]) -> None:
        """Raise the error of `refused` where there is one."""
        error = self.refused(leaves)
        if error is not None:
            raise error

    def admits(self, leaves: Sequence[Any]) -> bool:
        """Whether all sizes fit."""
        return self.refused(leaves) is None

    def given(self, condition: Condition, leaves: Sequence[Any]) -> dict[Size, int]:
        """The sizes that a condition speaks of."""
        return {
            (name, dim): leaves[self.names.index(name)].shape[dim]
            for _, name, dim in condition.sizes
        }


def dims_of_one(named: Named, requested: Requested) -> list[tuple[str, int]]:
    """(leaf name, dimension) of those that should be dynamic and have size 1."""
    leaves = dict(leaves_of(named))
    dims_of_size_one: list[tuple[str, int]] = []
    for name, dims in requested.items():
        leaf = leaves.get(name)
        if not isinstance(leaf, torch.Tensor):
            continue
        for dim in dims:
            if dim < leaf.dim() and leaf.shape[dim] == 1:
                dims_of_size_one.append((name, dim))
    return dims_of_size_one


def without_dims(requested: Requested, fixed: Collection[tuple[str, int]]) -> Requested:
    """The requested dimensions without these, which become fixed."""
    remaining: dict[str, dict[int, str]] = {}
    for name, dims in requested.items():
        remaining[name] = {dim: symbol for dim, symbol in dims.items() if (name, dim) not in fixed}
    return remaining
