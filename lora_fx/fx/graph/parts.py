"""The parts of a result that the rest of a graph reads apart, as the q, k and v of one product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    """The axis of a result that is the weight's out; None if no single axis is."""
    form = getattr(kind, "form", "")
    if form:
        return -1 if form == "right" else -2
    return {"conv": 1, "grouped": -1}.get(kind.name)


def parts_of(node: fx.Node, out_axis: int) -> tuple[Part, ...]:
    """The parts of a node's result along one axis; one part where it is used as a whole.

    Empty where no role is proven, and where the parts are no regions of the weight.
    """
    shape = tuple(hint(size) for size in shape_of(node) or ())
    if len(shape) < 2 or numel(shape) > LARGEST:
        return ()
    axis = out_axis % len(shape)
    size = shape[axis]
    if [user.target for user in node.users] == [aten.glu.default]:
        return ("up", 0, size // 2), ("gate", size // 2, size)

    views = reached([node], lambda view: filter(is_view, view.users))
    if not any(view.target in CUTS for view in views):
        role = role_of([(user, node) for user in node.users])
        return ((role, 0, size),) if role else ()

    pieces = _pieces(_reads(node, shape, axis))
    if pieces is None or not 2 <= len(pieces) <= LIMIT:
        return ()
    starts = [start for start, _ in pieces]
    stops = [stop for _, stop in pieces]
    if [*starts, size] != [0, *stops]:
        return ()  # they overlap, or leave something out
    roles = roles_of(list(pieces.values()))
    return tuple((role, start, stop) for role, (start, stop) in zip(roles, pieces, strict=True))


class _Read(NamedTuple):
    """The range that one reader of a result reads along out: from start to stop."""

    bounds: tuple[int, int]
    gapless: bool  # all of it, and not every second one
    step: Step


def _reads(node: fx.Node, shape: tuple[int, ...], axis: int) -> list[_Read]:
    """The ranges that are read along one axis of a node's result, one for each way through views.

    Each place along the axis gets its number, and the numbers go through the views that follow:
    what arrives at a node is the region that it reads.
    """
    along_axis = [1] * len(shape)
    along_axis[axis] = -1
    numbers = torch.arange(shape[axis]).view(along_axis).expand(shape)

    reads = []
    for arrived, step in _ways_out(node, numbers):
        places = torch.bincount(arrived.reshape(-1)).nonzero()[:, 0]  # unique() sorts them all
        if not len(places):
            continue  # the empty remainder of a partial rotation
        start = int(places[0])
        stop = int(places[-1]) + 1
        reads.append(_Read((start, stop), stop - start == len(places), step))
    return reads


def _pieces(reads: Sequence[_Read]) -> dict[tuple[int, int], list[Step]] | None:
    """The widest gapless regions that are read, in order, and the steps that read in each.

    None where something is read across them: heads are interleaved then.
    """
    regions = {read.bounds for read in reads if read.gapless}
    pieces: dict[tuple[int, int], list[Step]] = {}
    for region in sorted(regions):
        if not any(other != region and _within(region, other) for other in regions):
            pieces[region] = []

    for read in reads:
        piece = next((piece for piece in pieces if _within(read.bounds, piece)), None)
        if piece is None:
            return None
        pieces[piece].append(read.step)
    return pieces


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _ways_out(node: fx.Node, numbers: Any) -> Iterator[tuple[torch.Tensor, Step]]:
    """Every way out of a node: the numbers that arrive, and the first step that is no view."""
    for user in node.users:
        if not is_view(user):
            yield numbers, (user, node)
        elif user.target in (aten.to.dtype, aten.type_as.default, aten.dropout.default):
            yield from _ways_out(user, numbers)
        else:
            args, kwargs = map_arg(
                (user.args, user.kwargs),
                lambda operand: numbers if operand is node else plain(value(operand)),
            )
            try:
                viewed = user.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError):
                return
            yield from _ways_out(user, viewed)
