"""Prove a model equal to another by running both: the check that stands before every write.

The gate is relative to the largest output: ORT_TOL for fp32. Where a model exceeds it, its own
fp32-against-fp64 error decides: 4 × that + 1e-7. Narrower dtypes are gated by their own epsilon.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lora_fx.compare import ORT_TOL, Parity, compare
from lora_fx.fx.module import CapturedModule
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.inputs import SIZES

Run = Callable[[Mapping[str, np.ndarray[Any, Any]]], dict[str, np.ndarray[Any, Any]]]


def arrays_of(named: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors among flattened named arguments, as arrays by ONNX input name."""
    from torch.utils import _pytree as pytree

    from lora_fx.fx.calling import leaf_names

    leaves = pytree.tree_leaves(dict(named))
    return {
        n.replace(".", "_"): to_numpy(x)
        for n, x in zip(leaf_names(named), leaves, strict=True)
        if isinstance(x, torch.Tensor)
    }


def prove(
    ours: Run,
    reference: CapturedModule,
    *,
    arrays: Mapping[str, Any] | None = None,
    sizes: Sequence[tuple[int, int]] = SIZES,
    tol: float = ORT_TOL,
) -> list[Parity]:
    """Run both at every size; sizes that a pinned dimension makes equal run once.

    Args:
        ours: {input: array} → {output: array}.
        reference: The model to be equal to, in eval mode.
        arrays: A user's inputs instead of sampled ones (one run).
        tol: The gate in fp32.
    """
    reference.eval()
    results: list[Parity] = []
    seen: set[tuple[Any, ...]] = set()
    wide: CapturedModule | None = None
    for size in sizes if arrays is None else sizes[:1]:
        named = reference.sample(size, arrays)
        feeds = arrays_of(named)
        shapes = {k: v.shape for k, v in feeds.items()}
        if tuple(shapes.values()) in seen or _banned(reference, shapes):
            continue
        seen.add(tuple(shapes.values()))
        expected = reference.flat(named)
        gate = max(tol, _epsilon(expected))
        got = compare(ours(feeds), expected, shapes, gate)
        if not got.ok and gate == tol:
            wide = wide if wide is not None else widened(reference)
            own = own_error(wide, named, expected) if wide is not None else 0.0
            got = compare(ours(feeds), expected, shapes, max(tol, 4 * own + 1e-7))
        results.append(got)
    return results


def _banned(reference: CapturedModule, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return any(shapes.get(n.replace(".", "_"), (0,) * 9)[d] == 1 for n, d in reference.not_one)


def _epsilon(outputs: Mapping[str, np.ndarray[Any, Any]]) -> float:
    """The gate for outputs in a dtype narrower than fp32: 8 of its epsilons; else 0."""
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
    return max((8 * eps.get(v.dtype.name, 0.0) for v in outputs.values()), default=0.0)


def widened(model: CapturedModule) -> CapturedModule | None:
    """The model in fp64, captured anew; None where it cannot run there."""
    try:
        return copy.deepcopy(model).double().eval()
    except (RuntimeError, TypeError):
        return None


def own_error(
    wide: CapturedModule, named: Mapping[str, Any], narrow: Mapping[str, np.ndarray[Any, Any]]
) -> float:
    """Rel of a model's fp32 outputs to its own fp64 outputs; 0 where fp64 does not run."""

    def up(x: Any) -> Any:
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    from torch.utils import _pytree as pytree

    try:
        exact = wide.flat(pytree.tree_map(up, dict(named)))
    except Exception:  # the model has fp32 constants that do not mix with fp64
        return 0.0
    return compare(dict(narrow), exact, {}, 0.0).rel


def torch_run(module: CapturedModule) -> Run:
    """A torch module as {input: array} → {output: array}."""

    def run(feeds: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        from torch.utils import _pytree as pytree

        from lora_fx.fx.calling import leaf_names

        named = module.captured.named
        leaves, spec = pytree.tree_flatten(dict(named))
        new = [
            from_numpy(feeds[n.replace(".", "_")]) if isinstance(x, torch.Tensor) else x
            for n, x in zip(leaf_names(named), leaves, strict=True)
        ]
        return module.flat(pytree.tree_unflatten(new, spec))

    return run
