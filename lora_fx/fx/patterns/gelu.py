"""GELU written out in elementwise steps, recognised by what it computes.

Every step of such a chain is p(x) + q(x)·F(r(x)) with polynomials p, q, r of one x and F = tanh or
erf: GELU is p = q = x/2, r = x/√2 for erf, and r = √(2/π)·(x + .044715·x³) for tanh
(Hendrycks and Gimpel, arXiv 1606.08415). The order of the factors does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import fx

from lora_fx.fx.graph.nodes import dtype_of, reached

aten = torch.ops.aten
Poly = dict[int, float]
HALF: Poly = {1: 0.5}
ROOT = math.sqrt(2 / math.pi)
KINDS: dict[str, tuple[str, Poly]] = {
    "none": ("erf", {1: math.sqrt(0.5)}),
    "tanh": ("tanh", {1: ROOT, 3: 0.044715 * ROOT}),
}
"""`approximate` of torch's gelu → (F, r)."""
CLOSE = 1e-7
"""Constants of one formula are written with eight digits or more."""
LONGEST = 26
"""More nodes than any such chain has."""


@dataclass(frozen=True)
class _Form:
    """The value p + q·F(r); no F where q is empty."""

    p: Poly
    q: Poly
    name: str = ""
    r: Poly | None = None


def gelu_of(node: fx.Node, written: Collection[fx.Node]) -> tuple[fx.Node, str] | None:
    """(x, approximate) where a node is the GELU of x in several steps; None where it is not.

    Args:
        node: A product or a sum.
        written: Nodes that some op changes in place.
    """
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor):
        return None
    for x in _behind(node):
        form = _form(node, x, written) if dtype_of(x) == dtype_of(node) else None
        if form is None or form.r is None or not _close(form.p, HALF) or not _close(form.q, HALF):
            continue
        for approximate, (name, r) in KINDS.items():
            if form.name == name and _close(form.r, r):
                return x, approximate
    return None


def _behind(node: fx.Node) -> list[fx.Node]:
    """What a chain through this node may start from; nothing where no F is near."""
    walk = reached([node], lambda n: n.all_input_nodes if n.target in STEPS else [])
    near = list(islice(walk, 1, LONGEST))
    return near if any(n.target in FUNCTIONS for n in near) else []


def _form(node: object, x: fx.Node, written: Collection[fx.Node]) -> _Form | None:
    if node is x:
        return _Form({1: 1.0}, {})
    if isinstance(node, (int, float)):
        return _Form({0: float(node)}, {})
    if not isinstance(node, fx.Node) or node.target not in STEPS or node in written:
        return None
    if dtype_of(node) != dtype_of(x) or node.kwargs:
        return None
    parts = [_form(a, x, written) for a in node.args]
    known = [f for f in parts if f is not None]
    if len(known) < len(parts):
        return None
    return STEPS[node.target](*known)


def _sum(a: _Form, b: _Form, sign: float = 1.0) -> _Form | None:
    if a.q and b.q and (a.name, a.r) != (b.name, b.r):
        return None
    one = a if a.q else b
    return _Form(_plus(a.p, b.p, sign), _plus(a.q, b.q, sign), one.name, one.r)


def _product(a: _Form, b: _Form) -> _Form | None:
    if a.q and b.q:
        return None
    one = a if a.q else b
    q = _plus(_times(a.q, b.p), _times(a.p, b.q))
    return _Form(_times(a.p, b.p), q, one.name, one.r)


def _quotient(a: _Form, b: _Form) -> _Form | None:
    by = b.p.get(0, 0.0)
    if b.q or set(b.p) != {0} or by == 0.0:
        return None
    return _product(a, _Form({0: 1 / by}, {}))


def _power(a: _Form, b: _Form) -> _Form | None:
    n = b.p.get(0, 0.0)
    if a.q or b.q or set(b.p) != {0} or n not in (1.0, 2.0, 3.0):
        return None
    result = a
    for _ in range(int(n) - 1):
        result = _Form(_times(result.p, a.p), {})
    return result


def _function(a: _Form, name: str) -> _Form | None:
    return None if a.q else _Form({}, {0: 1.0}, name, a.p)


def _plus(a: Poly, b: Poly, sign: float = 1.0) -> Poly:
    return {n: c for n in {*a, *b} if (c := a.get(n, 0.0) + sign * b.get(n, 0.0))}


def _times(a: Poly, b: Poly) -> Poly:
    result: Poly = {}
    for n, c in a.items():
        for m, d in b.items():
            result[n + m] = result.get(n + m, 0.0) + c * d
    return result


def _close(a: Poly, b: Poly) -> bool:
    return a.keys() == b.keys() and all(abs(a[n] - c) <= CLOSE * abs(c) for n, c in b.items())


FUNCTIONS = (aten.tanh.default, aten.erf.default)
STEPS: dict[object, Callable[..., _Form | None]] = {
    aten.add.Tensor: _sum,
    aten.add.Scalar: _sum,
    aten.sub.Tensor: partial(_sum, sign=-1.0),
    aten.sub.Scalar: partial(_sum, sign=-1.0),
    aten.mul.Tensor: _product,
    aten.mul.Scalar: _product,
    aten.div.Tensor: _quotient,
    aten.div.Scalar: _quotient,
    aten.pow.Tensor_Scalar: _power,
    aten.square.default: lambda a: _product(a, a),
    aten.tanh.default: partial(_function, name="tanh"),
    aten.erf.default: partial(_function, name="erf"),
}
