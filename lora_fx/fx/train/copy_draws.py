"""Random numbers of copies that run in one vmap: each copy draws from its own generator.

An operator that draws, such as a dropout, runs once for each copy, on that copy's tensors, with
the state of that copy's generator. So a copy drops what its own run would have dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_fx.fx.trees import tree_flatten, tree_unflatten
from lora_fx.inputs import Named


@dataclass
class Draws:
    """The generators of one run: the CPU's, and the GPU's where the model is on one.

    Attributes:
        device: The device of the model.
        states: What the generators have now.
    """

    device: torch.device
    states: list[Tensor] = field(default_factory=list)

    @contextmanager
    def used(self) -> Iterator[None]:
        """A block that draws from these generators, which torch's own take the place of."""
        if self.states:
            torch.set_rng_state(self.states[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self.states[1], self.device)
        yield
        self.states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            self.states.append(torch.cuda.get_rng_state(self.device))

    def copied(self) -> Draws:
        """Return generators with the same states."""
        return Draws(self.device, list(self.states))


_SIZES: dict[object, Callable[..., int]] = {
    torch.ops.aten.sym_size.int: lambda x, dim: int(x.shape[dim]),
    torch.ops.aten.sym_numel.default: lambda x: int(x.numel()),
}
"""The operators of sizes, for which vmap has no rule: a copy's tensor has its own sizes."""


class DrawsApart(TorchFunctionMode):
    """In a vmap over copies: operators that draw run copy by copy.

    Args:
        draws: The generators of the copies.
        number: The number of the copy, a tensor that vmap maps over.
    """

    def __init__(self, draws: Sequence[Draws], number: Tensor) -> None:
        super().__init__()
        self._draws = draws
        self._number = number

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Named | None = None
    ) -> Any:
        """Run a function; see torch.overrides."""
        if func in _SIZES:
            return _SIZES[func](*args)
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **(kwargs or {}))
        operands, tree = tree_flatten((tuple(args), dict(kwargs or {})))

        def run(copy: int, *own: Any) -> Any:
            positional, keywords = tree_unflatten(list(own), tree)
            with self._draws[copy].used():
                return func(*positional, **keywords)

        return _CopyByCopy.apply(self._number, run, *operands)  # type: ignore[no-untyped-call]


class _CopyByCopy(torch.autograd.Function):
    """A function that vmap runs once for each copy; autograd follows the runs."""

    @staticmethod
    def forward(number: Tensor, run: Any, *operands: Any) -> Any:
        """Raise: the number of the copy is always mapped over."""
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: see torch.autograd.Function."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], number: Any, run: Any, *operands: Any
    ) -> Any:
        """Run each copy on its own part of the operands, and stack the results."""
        results = []
        for copy in range(info.batch_size):
            own = [
                operand if dim is None else operand.select(dim, copy)
                for operand, dim in zip(operands, in_dims[2:], strict=True)
            ]
            results.append(run(copy, *own))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        columns = zip(*results, strict=True)
        stacked = tuple(torch.stack(column) for column in columns)
        return stacked, (0,) * len(stacked)
