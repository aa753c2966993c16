"""A region of a train program that saves only its inputs, and runs again in backward.

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

from lora_fx.fx.func_transforms import transforms_are_active
from lora_fx.fx.module.codegen import function

Code = Callable[..., tuple[torch.Tensor, ...]]
Factors = tuple[tuple[torch.Tensor, ...], ...]


def region(code: Code, formula: Code | None = None) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return a function of (factors, *values) that recomputes a region in backward.

    Args:
        code: f: values → (x, …), pure, without random numbers.
        formula: Where the region returns x alone: (*values) → (x,), and (*values, dx=∂L/∂x) →
            x and the gradients of the first values. The other values get none.

    Returns:
        (factors, *values) → (x, …, t₁ …). `factors` holds one tuple for each product: the a's
        [rank, in] that stand below each other in it, in any floating dtype.
    """

    def recomputed(factors: Factors, *values: Any) -> tuple[torch.Tensor, ...]:
        if keeps_nothing():
            results = code(*values)
            products = [product(results[0], group) for group in factors]
            return (*results, *products)

        counts = tuple(len(group) for group in factors)
        flat: list[torch.Tensor] = []
        for group in factors:
            flat += group
        result: tuple[torch.Tensor, ...] = _Recomputed.apply(code, formula, counts, *flat, *values)  # type: ignore[no-untyped-call]
        return result

    return recomputed


def code_of(
    inputs: Sequence[fx.Node], steps: Sequence[fx.Node], outputs: Sequence[fx.Node], name: str
) -> Code:
    """Compile some steps of a graph to a function from their inputs to their outputs."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in steps:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return partial(function(graph, name), None)


def keeps_nothing() -> bool:
    """True if nothing is saved for backward, or if another tracer decides what is saved.

    Compilers choose what to recompute by themselves; torch.func has transforms of its own.
    """
    return not torch.is_grad_enabled() or traced()


def traced() -> bool:
    """True while a compiler or a transform of torch.func traces the run."""
    return torch.compiler.is_compiling() or transforms_are_active()


def stacked(group: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack the a's of one product to one matrix [ranks, in]."""
    if len(group) == 1:
        return group[0]
    return torch.cat(list(group))


def product(x: torch.Tensor, group: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return x·aᵀ in the dtype of x: [..., in] → [..., ranks]."""
    return torch.matmul(x, stacked(group).type_as(x).t())


class _Recomputed(torch.autograd.Function):
    """An autograd function that returns x, …, t₁ … and recomputes them in backward.

    Its arguments are the a's of all products (`counts` of each) and the values v.
    """

    @staticmethod
    def forward(
        ctx: Any, code: Code, formula: Code | None, counts: tuple[int, ...], *arguments: Any
    ) -> Any:
        n_factors = sum(counts)
        groups = _groups(arguments[:n_factors], counts)
        values = arguments[n_factors:]
        if formula is None:
            results = code(*values)
        else:
            results = formula(*values)
        x = results[0]

        # tensors are saved so that autograd sees a change in place, and other arguments as they are
        ctx.save_for_backward(*(v for v in arguments if isinstance(v, torch.Tensor)))
        ctx.constants = [None if isinstance(v, torch.Tensor) else (v,) for v in arguments]
        ctx.code = code
        ctx.formula = formula
        ctx.counts = counts
        ctx.autocast = autocast_state(x.device.type)
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[3 + n_factors :]):
            ctx.mark_non_differentiable(*results)
        products = [product(x, group) for group in groups]
        return (*results, *products)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved) if value is None else value[0] for value in ctx.constants]
        n_factors = sum(ctx.counts)
        groups = _groups(arguments[:n_factors], ctx.counts)
        values = arguments[n_factors:]
        needs = ctx.needs_input_grad[3:]
        values_need = needs[n_factors:]

        n_results = len(grads) - len(groups)
        d_results = list(grads[:n_results])
        d_products = grads[n_results:]
        if any(values_need):
            for group, dt in zip(groups, d_products, strict=True):
                if dt is not None:
                    a = stacked(group).to(dt.dtype)
                    d_results[0] = _sum(d_results[0], dt, a, ctx.dtype)

        # where a graph of the gradients is made, f runs on the values themselves
        twice = torch.is_grad_enabled()
        by_formula = None
        if not twice:
            by_formula = _by_formula(ctx.formula, values, d_results[0], values_need)
        if by_formula is not None:
            x, d_values = by_formula
        else:
            if not twice:
                values = _leaves(values, values_need)
            with torch.enable_grad(), in_autocast(ctx.autocast):
                results = ctx.code(*values)
            x = results[0] if twice else results[0].detach()
            d_values = _through(results, d_results, values, values_need, twice)

        if any(needs[:n_factors]):
            d_factors = _of_factors(x, groups, d_products)
        else:
            d_factors = [None] * n_factors
        return (None, None, None, *d_factors, *d_values)


def _sum(
    dx: torch.Tensor | None, dt: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return ∂L/∂t·a plus ∂L/∂x if there is one, in one op if the dtypes permit."""
    if dx is None:
        return torch.matmul(dt, a).to(dtype)
    if dx.dtype != dt.dtype:
        return dx + torch.matmul(dt, a).to(dtype)
    rows_of_dx = dx.reshape(-1, dx.shape[-1])
    rows_of_dt = dt.reshape(-1, dt.shape[-1])
    return torch.addmm(rows_of_dx, rows_of_dt, a).view_as(dx)


def _by_formula(
    formula: Code | None, values: Sequence[Any], dx: torch.Tensor | None, needs: Sequence[bool]
) -> tuple[torch.Tensor, list[torch.Tensor | None]] | None:
    """Return x and the gradients of the values; None if no formula gives all of them."""
    if formula is None or dx is None:
        return None
    x, *d_values = formula(*values, dx=dx)
    if any(needs[len(d_values) :]):
        return None  # a weight that was frozen when the region was made
    return x, [*d_values, *[None] * (len(values) - len(d_values))]


def _leaves(values: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
    """Return the values as leaves of a new graph, for one run of f with gradients."""
    leaves: list[Any] = []
    for value, need in zip(values, needs, strict=True):
        if isinstance(value, torch.Tensor):
            leaves.append(value.detach().requires_grad_(need))
        else:
            leaves.append(value)
    return leaves


def _through(
    results: Sequence[torch.Tensor],
    d_results: Sequence[torch.Tensor | None],
    values: Sequence[Any],
    needs: Sequence[bool],
    twice: bool,
) -> list[torch.Tensor | None]:
    """Return the gradients of the values from those of the results, through the graph of f."""
    outputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for result, gradient in zip(results, d_results, strict=True):
        if gradient is not None and result.requires_grad:
            outputs.append(result)
            gradients.append(gradient)
    inputs = [value for value, need in zip(values, needs, strict=True) if need]
    if not outputs or not inputs:
        return [None] * len(values)

    d_inputs = iter(
        torch.autograd.grad(outputs, inputs, gradients, allow_unused=True, create_graph=twice)
    )
    return [next(d_inputs) if need else None for need in needs]


def _of_factors(
    x: torch.Tensor,
    groups: Sequence[Sequence[torch.Tensor]],
    d_products: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Return ∂L/∂a = (∂L/∂t)ᵀ x for each a; None if its product got no gradient."""
    gradients: list[torch.Tensor | None] = []
    for group, dt in zip(groups, d_products, strict=True):
        if dt is None:
            gradients += [None] * len(group)
            continue
        rows = x.to(dt.dtype).reshape(-1, x.shape[-1])
        da = torch.matmul(dt.reshape(-1, dt.shape[-1]).t(), rows)
        of_each = torch.split(da, [len(a) for a in group])
        gradients += [d.to(a.dtype) for d, a in zip(of_each, group, strict=True)]
    return gradients


def _groups(flat: Sequence[torch.Tensor], counts: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
    factors = iter(flat)
    return [tuple(islice(factors, count)) for count in counts]


def autocast_state(device: str) -> tuple[str, bool, torch.dtype | None]:
    """Return the device, whether autocast is on for it, and the autocast dtype."""
    if not torch.amp.is_autocast_available(device):
        return device, False, None
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def in_autocast(state: tuple[str, bool, torch.dtype | None]) -> AbstractContextManager[object]:
    """Return a block with the autocast state of forward, which backward does not keep."""
    device, enabled, dtype = state
    if autocast_state(device) == state or dtype is None:
        return nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=enabled)
