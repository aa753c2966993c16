"""A region of a train program that keeps its inputs only, and runs again in backward.

The region is the norm or the activation f that feeds a group of branches, together with their
first products: (x, t₁ …) = (f(v…), f(v…)·a₁ᵀ …). Autograd would keep x for every ∂L/∂a, and what
f's own steps keep; the region keeps v. Backward runs f again and has

    ∂L/∂aᵢ = (∂L/∂tᵢ)ᵀ x        ∂L/∂x += ∂L/∂tᵢ · aᵢ        ∂L/∂v by autograd through f.

A frozen layer that reads x keeps its weight and nothing of x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

Code = Callable[..., tuple[torch.Tensor, ...]]
Factors = tuple[tuple[torch.Tensor, ...], ...]


def region(code: Code) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function of (factors, *values) for a program.

    Args:
        code: f: values → (x, …), pure, without random numbers.

    Returns:
        (factors, *values) → (x, …, t₁ …). `factors` holds one tuple for each product: the a's
        [rank, in] that stand below each other in it, in any floating dtype.
    """

    def recomputed(factors: Factors, *values: Any) -> tuple[torch.Tensor, ...]:
        if _plainly():
            made = code(*values)
            return (*made, *(product(made[0], group) for group in factors))
        counts = tuple(len(group) for group in factors)
        flat = [a for group in factors for a in group]
        result: tuple[torch.Tensor, ...] = _Recomputed.apply(code, counts, *flat, *values)  # type: ignore[no-untyped-call]
        return result

    return recomputed


def _plainly() -> bool:
    """True where nothing is kept, or where another tracer decides what is.

    Compilers choose what to recompute by themselves; torch.func has transforms of its own.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return True
    return bool(torch._C._are_functorch_transforms_active())


def stacked(group: Sequence[torch.Tensor]) -> torch.Tensor:
    """The a's of one product as one matrix [ranks, in]."""
    return group[0] if len(group) == 1 else torch.cat(list(group))


def product(x: torch.Tensor, group: Sequence[torch.Tensor]) -> torch.Tensor:
    """X·aᵀ in the dtype of x: [..., in] → [..., ranks]."""
    return torch.matmul(x, stacked(group).type_as(x).t())


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, code: Code, counts: tuple[int, ...], *values: Any) -> Any:
        n = sum(counts)
        made = code(*values[n:])
        groups = _groups(values[:n], counts)
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(v, torch.Tensor) else (v,) for v in values]
        ctx.code, ctx.counts = code, counts
        ctx.autocast = _autocast(made[0].device.type)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[2 + n :]):
            ctx.mark_non_differentiable(*made)
        return (*made, *(product(made[0], group) for group in groups))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if o is None else o[0] for o in ctx.others]
        n, twice = sum(ctx.counts), torch.is_grad_enabled()
        needs = ctx.needs_input_grad[2:]
        given = [
            v.detach().requires_grad_(need) if isinstance(v, torch.Tensor) and not twice else v
            for v, need in zip(values[n:], needs[n:], strict=True)
        ]
        with torch.enable_grad(), _again(ctx.autocast):
            made = ctx.code(*given)
        x = made[0] if twice else made[0].detach()
        into: list[torch.Tensor | None] = list(grads[: len(made)])
        found: list[torch.Tensor | None] = []
        groups = _groups(values[:n], ctx.counts)
        for group, dt in zip(groups, grads[len(made) :], strict=True):
            wanted = needs[len(found) : len(found) + len(group)]
            if dt is None:
                found += [None] * len(group)
                continue
            if any(wanted):
                rows = x.to(dt.dtype).reshape(-1, x.shape[-1])
                da = torch.matmul(dt.reshape(-1, dt.shape[-1]).t(), rows)
                parts = torch.split(da, [len(a) for a in group])
                found += [
                    p.to(a.dtype) if w else None
                    for p, a, w in zip(parts, group, wanted, strict=True)
                ]
            else:
                found += [None] * len(group)
            if any(needs[n:]):
                dx = torch.matmul(dt, stacked(group).to(dt.dtype)).to(x.dtype)
                into[0] = dx if into[0] is None else into[0] + dx
        return (None, None, *found, *_through(made, into, given, needs[n:], twice))


def _through(
    made: Sequence[torch.Tensor],
    into: Sequence[torch.Tensor | None],
    given: Sequence[Any],
    needs: Sequence[bool],
    twice: bool,
) -> list[torch.Tensor | None]:
    """Gradients of what f was given, from those of what it made."""
    ends = [(y, g) for y, g in zip(made, into, strict=True) if g is not None and y.requires_grad]
    wanted = [v for v, need in zip(given, needs, strict=True) if need]
    if not ends or not wanted:
        return [None] * len(given)
    outputs, gradients = zip(*ends, strict=True)
    got = iter(
        torch.autograd.grad(outputs, wanted, gradients, allow_unused=True, create_graph=twice)
    )
    return [next(got) if need else None for need in needs]


def _groups(flat: Sequence[object], counts: Sequence[int]) -> list[tuple[Any, ...]]:
    parts, at = [], 0
    for count in counts:
        parts.append(tuple(flat[at : at + count]))
        at += count
    return parts


def _autocast(device: str) -> tuple[str, bool, torch.dtype | None]:
    """What autocast does on a device now."""
    if not torch.amp.is_autocast_available(device):
        return device, False, None
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _again(state: tuple[str, bool, torch.dtype | None]) -> Any:
    """Autocast as it was in forward; backward has none of its own."""
    device, enabled, dtype = state
    if _autocast(device) == state or dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=enabled)
