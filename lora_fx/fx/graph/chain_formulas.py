"""Chains of elementwise steps whose gradients have a formula: which formula a chain has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import fx

from lora_fx.fx.gelu_tanh import gelu_tanh
from lora_fx.fx.graph.elementwise_chains import VIEWS, Chain
from lora_fx.fx.graph.nodes import dtype_of, shape_of
from lora_fx.fx.region_formulas import gated_silu, rms_norm

aten = torch.ops.aten
Formula = Callable[..., tuple[torch.Tensor, ...]]
NARROW = (torch.bfloat16, torch.float16)
RMS_NORM = [
    aten.to.dtype,
    aten.pow.Tensor_Scalar,
    aten.mean.dim,
    aten.add.Tensor,
    aten.rsqrt.default,
    aten.mul.Tensor,
    aten.to.dtype,
    aten.mul.Tensor,
]


def formula_of(chain: Chain, differentiable: Mapping[fx.Node, bool]) -> Formula | None:
    """Return the formula of x = f(chain.reads), of which a gradient is asked; None if it has none.

    Args:
        chain: Its last step is x, and nothing outside reads another step.
        differentiable: Nodes through which a gradient can flow.
    """
    if _is_gelu_tanh(chain):
        return _gelu_tanh_of_first
    if _is_gated_silu(chain):
        return gated_silu
    eps = _eps_of_rms_norm(chain, differentiable)
    if eps is not None:
        return partial(rms_norm, eps=eps)
    return None


def _gelu_tanh_of_first(
    v: torch.Tensor, *sizes: object, dx: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Return gelu_tanh of the first value; views in the chain read sizes too."""
    if dx is None:
        return gelu_tanh(v)
    return gelu_tanh(v, dx)


def _is_gelu_tanh(chain: Chain) -> bool:
    """True if the chain is exactly GELU by its tanh formula."""
    ops = [(step.target, step.kwargs) for step in chain.steps if step.target not in VIEWS]
    if ops != [(aten.gelu.default, {"approximate": "tanh"})]:
        return False
    return _have_one_shape(chain.reads[0], chain.steps[-1])


def _is_gated_silu(chain: Chain) -> bool:
    """True if the chain is silu(gate)·up, with gate and up of one shape and dtype."""
    if [step.target for step in chain.steps] != [aten.silu.default, aten.mul.Tensor]:
        return False
    silu, product = chain.steps
    gate = silu.args[0]
    others = [arg for arg in product.args if arg is not silu]
    if len(others) != 1 or chain.reads != (gate, *others):
        return False
    return all(
        _have_one_shape(read, product) and dtype_of(read) == dtype_of(product)
        for read in chain.reads
    )


def _eps_of_rms_norm(chain: Chain, differentiable: Mapping[fx.Node, bool]) -> float | None:
    """Return the eps of an RMS norm in 16 bits with a frozen weight; None for another chain."""
    if [step.target for step in chain.steps] != RMS_NORM:
        return None
    wide, squares, mean, sum_, r, scaled, narrow, x = chain.steps
    if len(chain.reads) != 2:
        return None
    v, weight = chain.reads
    eps = sum_.args[1]
    if not isinstance(eps, float):
        return None
    as_written = (
        wide.args == (v, torch.float32)
        and squares.args == (wide, 2)
        and mean.args == (squares, [-1], True)
        and sum_.args[0] is mean
        and r.args == (sum_,)
        and set(scaled.args) == {wide, r}
        and narrow.args == (scaled, dtype_of(v))
        and set(x.args) == {weight, narrow}
    )
    if not as_written or any(step.kwargs for step in chain.steps):
        return None
    if dtype_of(v) not in NARROW or dtype_of(weight) != dtype_of(v):
        return None
    if differentiable.get(weight) or not _have_one_shape(v, x):
        return None
    return eps


def _have_one_shape(first: fx.Node, second: fx.Node) -> bool:
    # texts are compared: sizes would ask symbols
    return str(shape_of(first)) == str(shape_of(second))
