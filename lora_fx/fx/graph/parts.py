"""The parts of a result that a graph reads separately, such as q, k and v of one product."""

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
"""The role of a part, and its half-open bounds along `out`."""


CUTS = SPLITS | aten_ops("slice.Tensor select.int narrow")


LIMIT = 8
"""The most parts that have roles; more parts are heads, or steps of a loop."""


LARGEST = 1 << 22
"""The most elements of a result whose parts are found; this takes a tensor of the same size."""


def out_axis(kind: Kind) -> int | None:
    """Return the axis of a result that is the weight's `out`; None if no single axis is."""
    form = getattr(kind, "form", "")
    if form:
        return -1 if form == "right" else -2
    return {"conv": 1, "grouped": -1}.get(kind.name)


def parts_of(node: fx.Node, out_axis: int) -> tuple[Part, ...]:
    """Return the parts of a node's result along one axis; one part if nothing cuts the result.

    Empty if no role is proven, or if the parts are not regions of the weight.
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
    """The range along `out` that one reader of a result reads, from start to stop."""

    bounds: tuple[int, int]
    gapless: bool  # all of it, and not every second one
    step: Step


def _reads(node: fx.Node, shape: tuple[int, ...], axis: int) -> list[_Read]:
    """Return the ranges that are read along one axis of a result, one per way through views.

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
    """Return the widest gapless ranges, in order, with the steps that read inside each.

    None if a reader reads across them, as with interleaved heads.
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
    """Yield each way through views to another op: the numbers that arrive there, and that step."""
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
