"""A read of a stack of matrices that adds a branch to each product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.utils.checkpoint import checkpoint

from lora_fx.fx.attach.live_state import Live
from lora_fx.fx.attach.recording import Bound
from lora_fx.fx.trees import tree_map_only

Op = Callable[..., object]


Named = Mapping[str, object]


PRODUCTS = {
    "linear": 2,
    "matmul": 2,
    "__matmul__": 2,
    "bmm": 2,
    "mm": 2,
    "grouped_mm": 3,
    "_grouped_mm": 3,
    "grouped_mm_fallback": 3,
}
"""Names of products, and how many arguments they may have for a branch: the third is `offs`."""


METADATA = ("dtype", "device", "shape", "ndim", "dim", "size", "data_ptr")


@dataclass(eq=False)
class LiveStack:
    """A read of W [experts, …] with an update: products with x get the branch of the update.

    torch hands over every op that takes one. A product may come after a transpose, or after data
    has picked matrices; whatever else takes a stack gets W + ΔW.

    Attributes:
        stored: W.
        live: The state of its module.
        leaf: Its name there.
        branch: The program of a product's result with the branch in it.
        turned: True after a transpose of the matrices.
        picks: Indices that picked along the first axis.
    """

    stored: torch.Tensor
    live: Live
    leaf: str
    branch: Bound
    turned: bool = False
    picks: tuple[int | torch.Tensor, ...] = ()

    def view(self, w: torch.Tensor) -> torch.Tensor:
        """A tensor [experts, …] as an op reads the stack."""
        for ids in self.picks:
            w = w[ids]
        return w.mT if self.turned else w

    def formed(self) -> torch.Tensor:
        """W + ΔW as an op reads it."""
        self.live.formed.add(self.leaf)
        return self.view(cast(torch.Tensor, self.live.weights[self.leaf][0](self.stored)))

    def transpose(self, *axes: int) -> torch.Tensor | LiveStack:
        """The stack with two axes exchanged."""
        if self.picks or {axis % 3 for axis in axes} != {1, 2}:
            return self.formed().transpose(*axes)
        return replace(self, turned=not self.turned)

    def __getitem__(self, index: int | torch.Tensor) -> torch.Tensor | LiveStack:
        """Matrices of the stack; anything else of W + ΔW."""
        if self.picks or not isinstance(index, (int, torch.Tensor)):
            return self.formed()[index]
        return replace(self, picks=(index,))

    def __getattr__(self, name: str) -> object:
        """An attribute of W + ΔW; an attribute that W has too is read from W."""
        if name in METADATA:
            return getattr(self.view(self.stored), name)
        return getattr(self.formed(), name)

    def __len__(self) -> int:
        """The number of matrices."""
        return len(self.view(self.stored))

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The matrices of W + ΔW."""
        return iter(self.formed())

    def __matmul__(self, x: torch.Tensor) -> object:
        """Every matrix times x."""
        return torch.matmul(self, x)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, func: Op, types: object, args: Sequence[object] = (), kwargs: Named | None = None
    ) -> object:
        """Run an op that takes a stack."""
        named = {name: value for name, value in (kwargs or {}).items() if value is not None}
        stacks = [operand for operand in args[:2] if isinstance(operand, cls)]
        xs = [
            operand
            for operand in args[:2]
            if isinstance(operand, torch.Tensor) and operand.dim() > 1
        ]
        if len(stacks) == len(xs) == 1 and _is_product(func, len(args), named):
            return stacks[0].product(func, xs[0], args, named)
        args, all_named = tree_map_only(cls, cls.formed, (args, dict(kwargs or {})))
        return func(*args, **all_named)

    def product(self, func: Op, x: torch.Tensor, args: Sequence[object], named: Named) -> object:
        """The op on W and x, plus the branch."""
        is_left = args[0] is self
        is_linear = func.__name__ == "linear"

        def op(x: torch.Tensor, w: torch.Tensor) -> object:
            operands = (w, x) if is_left else (x, w)
            return func(*operands, *args[2:], **named)

        def through(x: torch.Tensor, w: torch.Tensor) -> object:
            for ids in self.picks:  # w [experts, in, out] of a factor
                w = w[ids]
            return op(x, w.mT if is_left or is_linear else w)

        def run(x: torch.Tensor) -> object:
            return self.branch(x, op(x, self.view(self.stored)), through)

        if self.picks and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # the copies that data picks, one a row, are made again in backward and not kept
            return checkpoint(run, x, use_reentrant=False)
        return run(x)


def _is_product(func: Op, count: int, named: Named) -> bool:
    """Whether an op is a product, without arguments that a branch knows nothing of."""
    if set(named) - {"offs"}:
        return False
    return count + len(named) <= PRODUCTS.get(func.__name__, 0)
