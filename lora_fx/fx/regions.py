"""A region of a train program that keeps its inputs only, and runs again in backward.

The region is the norm or the activation f that feeds a group of branches, together with their
first products: (x, t₁ …) = (f(v…), f(v…)·a₁ᵀ …). Autograd would keep x for every ∂L/∂a, and what
f's own steps keep; the region keeps v. Backward runs f again and has

    ∂L/∂aᵢ = (∂L/∂tᵢ)ᵀ x        ∂L/∂x += ∂L/∂tᵢ · aᵢ        ∂L/∂v by autograd through f.

A frozen layer that reads x keeps its weight and nothing of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import fx

from lora_fx.fx.interception import transforms_are_active
from lora_fx.fx.module.codegen import function

Code = Callable[..., tuple[torch.Tensor, ...]]


Factors = tuple[tuple[torch.Tensor, ...], ...]


def region(code: Code, formula: Code | None = None) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function of (factors, *values) for a program.

    Args:
        code: f: values → (x, …), pure, without random numbers.
        formula: Where x is made of the first value v alone, in its shape: v → (x,), and
            (v, ∂L/∂x) → (x, ∂L/∂v).

    Returns:
        (factors, *values) → (x, …, t₁ …). `factors` holds one tuple for each product: the a's
        [rank, in] that stand below each other in it, in any floating dtype.
    """

    def recomputed(factors: Factors, *values: Any) -> tuple[torch.Tensor, ...]:
        if keeps_nothing():
            made = code(*values)
            return (*made, *(product(made[0], group) for group in factors))
        counts = tuple(len(group) for group in factors)
        flat = [a for group in factors for a in group]
        result: tuple[torch.Tensor, ...] = _Recomputed.apply(code, formula, counts, *flat, *values)  # type: ignore[no-untyped-call]
        return result

    return recomputed


def keeps_nothing() -> bool:
    """True where nothing is kept, or where another tracer decides what is.

    Compilers choose what to recompute by themselves; torch.func has transforms of its own.
    """
    return not torch.is_grad_enabled() or traced()


def traced() -> bool:
    """True while a compiler or a transform of torch.func sees what is run."""
    return torch.compiler.is_compiling() or transforms_are_active()


def stacked(group: Sequence[torch.Tensor]) -> torch.Tensor:
    """The a's of one product as one matrix [ranks, in]."""
    return group[0] if len(group) == 1 else torch.cat(list(group))


def product(x: torch.Tensor, group: Sequence[torch.Tensor]) -> torch.Tensor:
    """X·aᵀ in the dtype of x: [..., in] → [..., ranks]."""
    return torch.matmul(x, stacked(group).type_as(x).t())


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, code: Code, formula: Code | None, counts: tuple[int, ...], *values: Any
    ) -> Any:
        n = sum(counts)
        made = code(*values[n:]) if formula is None else formula(values[n])
        groups = _groups(values[:n], counts)
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(v, torch.Tensor) else (v,) for v in values]
        ctx.code, ctx.formula, ctx.counts = code, formula, counts
        ctx.autocast, ctx.dtype = _autocast(made[0].device.type), made[0].dtype
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[3 + n :]):
            ctx.mark_non_differentiable(*made)
        return (*made, *(product(made[0], group) for group in groups))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if o is None else o[0] for o in ctx.others]
        n, twice = sum(ctx.counts), torch.is_grad_enabled()
        needs, groups = ctx.needs_input_grad[3:], _groups(values[:n], ctx.counts)
        first = len(grads) - len(groups)
        into, dts = list(grads[:first]), grads[first:]
        for group, dt in zip(groups, dts, strict=True):
            if dt is not None and any(needs[n:]):
                into[0] = _sum(into[0], dt, stacked(group).to(dt.dtype), ctx.dtype)
        if ctx.formula is not None and into[0] is not None and not twice:
            x, dv = ctx.formula(values[n], into[0])
            through = [dv, *[None] * len(values[n + 1 :])]
        else:
            given = [
                v.detach().requires_grad_(need) if isinstance(v, torch.Tensor) and not twice else v
                for v, need in zip(values[n:], needs[n:], strict=True)
            ]
            with torch.enable_grad(), _again(ctx.autocast):
                made = ctx.code(*given)
            x = made[0] if twice else made[0].detach()
            through = _through(made, into, given, needs[n:], twice)
        found: list[torch.Tensor | None] = []
        for group, dt in zip(groups, dts, strict=True):
            if dt is None or not any(needs[:n]):
                found += [None] * len(group)
                continue
            rows = x.to(dt.dtype).reshape(-1, x.shape[-1])
            da = torch.matmul(dt.reshape(-1, dt.shape[-1]).t(), rows)
            parts = torch.split(da, [len(a) for a in group])
            found += [p.to(a.dtype) for p, a in zip(parts, group, strict=True)]
        return (None, None, None, *found, *through)


def _sum(
    dx: torch.Tensor | None, dt: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """∂L/∂t·a and what is there of ∂L/∂x already: in one op where the dtypes allow it."""
    if dx is None or dx.dtype != dt.dtype:
        part = torch.matmul(dt, a).to(dtype)
        return part if dx is None else dx + part
    have, more = (v.reshape(-1, v.shape[-1]) for v in (dx, dt))
    return torch.addmm(have, more, a).view_as(dx)


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
    found = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True, create_graph=twice)
    got = iter(found)
    return [next(got) if need else None for need in needs]


def _groups(flat: Sequence[torch.Tensor], counts: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
    rest = iter(flat)
    return [tuple(islice(rest, count)) for count in counts]


def _autocast(device: str) -> tuple[str, bool, torch.dtype | None]:
    """What autocast does on a device now."""
    if not torch.amp.is_autocast_available(device):
        return device, False, None
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _again(state: tuple[str, bool, torch.dtype | None]) -> AbstractContextManager[object]:
    """Autocast as it was in forward; backward has none of its own."""
    device, enabled, dtype = state
    if _autocast(device) == state or dtype is None:
        return nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=enabled)


def code_of(
    given: Sequence[fx.Node], steps: Sequence[fx.Node], made: Sequence[fx.Node], name: str
) -> Code:
    """Some steps of a graph as one function: what they are given → what they make."""
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in given}
    for node in steps:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in made))
    return partial(function(graph, name), None)
