"""The parts of a result that the rest of a graph reads apart, as the q, k and v of one product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from lora_fx.fx.graph.nodes import (
    aten_ops,
    hint,
    numel,
    plain,
    reached,
    shape_of,
    value,
)
from lora_fx.fx.graph.roles import Step, role_of, roles_of
from lora_fx.fx.graph.views import SPLITS, is_view
from lora_fx.ir.graph import Kind

aten = torch.ops.aten

Part = tuple[str, int, int]
"""The role of a part, and its half-open bounds along out."""


CUTS = SPLITS | aten_ops("slice.Tensor select.int narrow")


LIMIT = 8
"""More parts than this are heads, or steps of a loop, and have no roles."""


LARGEST = 1 << 22
"""Results of more elements are not cut up: their parts are found on a tensor of that size."""


def out_axis(kind: Kind) -> int | None:
    """The axis of a result along which the weight's out lies; None where no single one does."""
    form = getattr(kind, "form", "")
    if form:
        return -1 if form == "right" else -2
    return {"conv": 1, "grouped": -1}.get(kind.name)


def parts_of(node: fx.Node, out_axis: int) -> tuple[Part, ...]:
    """The parts of a node's result along one axis; one part where it is used as a whole."""
    shape = tuple(hint(n) for n in shape_of(node) or ())
    if len(shape) < 2 or numel(shape) > LARGEST:
        return ()
    axis = out_axis % len(shape)
    size = shape[axis]
    halves = [u for u in node.users if u.target is aten.glu.default]
    if halves and len(node.users) == 1:
        return ("up", 0, size // 2), ("gate", size // 2, size)
    views = reached([node], lambda n: filter(is_view, n.users))
    if not any(n.target in CUTS for n in views):
        role = role_of([(u, node) for u in node.users])
        return ((role, 0, size),) if role else ()
    # Each place along out gets its number, and the numbers go through the views that follow: what
    # arrives at a node is the region that it reads.
    marks = torch.arange(size).view([-1 if i == axis else 1 for i in range(len(shape))])
    runs: list[tuple[int, int, bool, Step]] = []
    for marked, step in _leaves(node, marks.expand(shape)):
        seen = torch.bincount(marked.reshape(-1)).nonzero()[:, 0]  # unique() sorts them all
        if not len(seen):
            continue  # the empty rest of a partial rotation
        lo, hi = int(seen[0]), int(seen[-1]) + 1
        runs.append((lo, hi, hi - lo == len(seen), step))
    bounds = {(lo, hi) for lo, hi, joined, _ in runs if joined}
    outer = [p for p in bounds if not any(q != p and _within(p, q) for q in bounds)]
    pieces: dict[tuple[int, int], list[Step]] = {p: [] for p in sorted(outer)}
    for lo, hi, _, step in runs:
        home = next((p for p in pieces if _within((lo, hi), p)), None)
        if home is None:
            return ()  # interleaved by heads: no region of the weight
        pieces[home].append(step)
    ends = [0, *(hi for _, hi in pieces)]
    if not 2 <= len(pieces) <= LIMIT or ends != [*(lo for lo, _ in pieces), size]:
        return ()
    roles = roles_of(list(pieces.values()))
    return tuple((role, lo, hi) for role, (lo, hi) in zip(roles, pieces, strict=True))


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _leaves(node: fx.Node, marks: Any) -> Iterator[tuple[torch.Tensor, Step]]:
    """Every way out of a node: its marks, and the first node on it that is no view."""
    for user in node.users:
        if not is_view(user):
            yield marks, (user, node)
            continue
        args, kwargs = map_arg(
            (user.args, user.kwargs), lambda n: marks if n is node else plain(value(n))
        )
        if user.target in (aten.to.dtype, aten.type_as.default, aten.dropout.default):
            made = marks
        else:
            try:
                made = user.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError):
                return
        yield from _leaves(user, made)
