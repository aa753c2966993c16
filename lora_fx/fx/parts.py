"""What the parts of a result are for, by data flow: q k v of attention, gate and up of an MLP.

Every element of the result is marked with its index along out, and the marks are followed through
the views after the op, which run for real on whole numbers. Where they come apart into disjoint
runs, each run is a part. What a part meets first tells its role:

    q, k      the two operands of the first product of activations (or of sdpa)
    v         the second operand of the next one
    gate, up  what goes through an activation function, and what it is multiplied with
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from lora_fx.fx import ops
from lora_fx.fx.nodes import hint, numel, shape_of, value
from lora_fx.fx.views import SPLITS, VIEWS
from lora_fx.ir.graph import Kind

aten = torch.ops.aten
Part = tuple[str, int, int]
"""Role, and half-open bounds along out."""
Step = tuple[fx.Node, fx.Node]
"""A node, and the one before it on the way."""

CUTS = SPLITS | {aten.slice.Tensor, aten.select.int, aten.narrow.default}
GATES = {
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
}
ATTENTION = {aten.scaled_dot_product_attention.default}
LIMIT = 8
"""More parts than this are heads, or steps of a loop."""
LARGEST = 1 << 22
FAR = 60
"""How many nodes behind a part its role is looked for."""


@dataclass
class _Piece:
    lo: int
    hi: int
    users: list[Step] = field(default_factory=list)


def out_axis(kind: Kind) -> int | None:
    """The axis of a result along which the weight's out lies."""
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
    if not _is_cut(node):
        role = _role_alone(node)
        return ((role, 0, size),) if role else ()
    marks = torch.arange(size).view([-1 if i == axis else 1 for i in range(len(shape))])
    runs: list[tuple[int, int, bool, Step]] = []
    for marked, step in _leaves(node, marks.expand(shape)):
        seen = torch.unique(marked)
        if not len(seen):
            continue  # the empty rest of a partial rotation
        lo, hi = int(seen[0]), int(seen[-1]) + 1
        runs.append((lo, hi, hi - lo == len(seen), step))
    bounds = {(lo, hi) for lo, hi, joined, _ in runs if joined}
    outer = [p for p in bounds if not any(q != p and _within(p, q) for q in bounds)]
    ordered = [_Piece(lo, hi) for lo, hi in sorted(outer)]
    for lo, hi, _, step in runs:
        home = next((p for p in ordered if _within((lo, hi), (p.lo, p.hi))), None)
        if home is None:
            return ()  # interleaved by heads: no region of the weight
        home.users.append(step)
    whole = [0, *(p.hi for p in ordered)]
    if len(ordered) > LIMIT or whole != [*(p.lo for p in ordered), size] or len(ordered) < 2:
        return ()
    return tuple((r, p.lo, p.hi) for r, p in zip(_roles(ordered), ordered, strict=True))


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _is_cut(node: fx.Node) -> bool:
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if user in seen or not _views(user):
                continue
            if user.target in CUTS:
                return True
            seen.add(user)
            queue.append(user)
    return False


def _views(node: fx.Node) -> bool:
    return node.target in VIEWS or node.target in SPLITS


def _leaves(node: fx.Node, marks: Any) -> Iterator[tuple[torch.Tensor, Step]]:
    """(marks, first node that is no view) of every way out of a node."""
    for user in node.users:
        if not _views(user):
            yield marks, (user, node)
            continue
        args, kwargs = map_arg(
            (user.args, user.kwargs), lambda n: marks if n is node else _plain(n)
        )
        if user.target in (aten.to.dtype, aten.type_as.default, aten.dropout.default):
            made = marks
        else:
            try:
                made = user.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError):
                return
        yield from _leaves(user, made)


def _plain(node: fx.Node) -> Any:
    v = value(node)
    return hint(v) if isinstance(v, torch.SymInt) else v


def _roles(pieces: list[_Piece]) -> list[str]:
    gated = [any(u.target in GATES for u, _ in p.users) for p in pieces]
    if len(pieces) == 2 and sum(gated) == 1:
        return ["gate" if g else "up" for g in gated]
    met = [_product(p.users) for p in pieces]
    return [_attention(m, met) for m in met]


def _attention(mine: tuple[fx.Node, int] | None, met: list[Any]) -> str:
    if mine is None:
        return ""
    node, operand = mine
    if node.target in ATTENTION:
        return "qkv"[operand] if operand < 3 else ""
    if operand == 0:
        return "q" if any(m and m[0] is node and m[1] == 1 for m in met) else ""
    return "k" if any(m and m[0] is node and m[1] == 0 for m in met) else "v"


def _role_alone(node: fx.Node) -> str:
    """The role of a result that is used as a whole: only what sdpa says of it is certain."""
    met = _product([(u, node) for u in node.users])
    if met is not None and met[0].target in ATTENTION and met[1] < 3:
        return "qkv"[met[1]]
    return ""


def _product(steps: list[Step]) -> tuple[fx.Node, int] | None:
    """The first product of activations behind some nodes, and which operand leads there."""
    queue, seen = list(steps), set[fx.Node]()
    while queue and len(seen) < FAR:
        node, source = queue.pop(0)
        row = ops.row_of(node)
        if node.target in ATTENTION or (row is not None and _is_data(node)):
            return node, next((i for i, a in enumerate(node.args) if a is source), 0)
        if node not in seen and row is None and node.op == "call_function":
            queue += [(u, node) for u in node.users]
        seen.add(node)
    return None


def _is_data(node: fx.Node) -> bool:
    """True for a product none of whose operands is read from the model."""
    return all(i.op != "get_attr" for i in node.all_input_nodes) and node.target in (
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        aten.baddbmm.default,
    )
