"""GELU written out in elementwise steps, recognised by its values.

Such a chain is x/2·(1 + F(r(x))), r = x/√2 for F = erf, and r = √(2/π)·(x + .044715·x³) for tanh
(Hendrycks and Gimpel, arXiv 1606.08415), its factors in any order. It runs on numbers, and what
comes out is compared.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.fx.graph.nodes import (
    aten_ops,
    dtype_of,
    reached,
)

aten = torch.ops.aten

STEPS = aten_ops(
    "add.Tensor add.Scalar sub.Tensor sub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar "
    "pow.Tensor_Scalar square tanh erf"
)


FUNCTIONS = aten_ops("tanh erf")


POINTS = torch.linspace(-8, 8, 129, dtype=torch.float64, device="cpu")
"""Numbers on both sides of 0, up to where GELU is x, or 0."""


GELUS = {kind: F.gelu(POINTS, approximate=kind) for kind in ("none", "tanh")}


CLOSE = 1e-7
"""Constants of one formula are written with eight digits or more."""


LONGEST = 26
"""More nodes than any such chain has."""


def gelu_of(node: fx.Node, written: Collection[fx.Node]) -> tuple[fx.Node, str] | None:
    """(x, approximate) where a node is the GELU of x in several steps; None where it is not.

    Args:
        node: A product or a sum.
        written: Nodes that some op changes in place.
    """
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor):
        return None

    def steps_before(step: fx.Node) -> list[fx.Node]:
        return step.all_input_nodes if step.target in STEPS else []

    candidates = list(islice(reached([node], steps_before), 1, LONGEST))
    if not any(candidate.target in FUNCTIONS for candidate in candidates):
        return None
    for x in candidates:
        result = _computed(node, x, written)
        if not isinstance(result, torch.Tensor):
            continue
        for approximate, expected in GELUS.items():
            if torch.allclose(result, expected, CLOSE, CLOSE):
                return x, approximate
    return None


def _computed(
    node: object, x: fx.Node, written: Collection[fx.Node]
) -> torch.Tensor | float | None:
    """The values of a chain at POINTS in place of x; None if it reads anything else."""
    if node is x:
        return POINTS
    if isinstance(node, (int, float)):
        return node
    if not isinstance(node, fx.Node) or node.target not in STEPS or node in written:
        return None
    if dtype_of(node) != dtype_of(x) or node.kwargs:
        return None
    operands = [_computed(arg, x, written) for arg in node.args]
    if any(operand is None for operand in operands):
        return None
    result: torch.Tensor | float = node.target(*operands)  # type: ignore[operator]
    return result
