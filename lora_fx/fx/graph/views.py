"""Ops that only view their operand, and the steps of each view."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch import fx
from torch.fx import Node

from lora_fx.fx.graph.nodes import (
    argument,
    aten_ops,
    dtype_name,
    numel,
    shape_of,
    value,
)
from lora_fx.ir.einsum import Shape
from lora_fx.ir.view import Cast, Gather, Permute, Reshape, Slice, Step

aten = torch.ops.aten


def static_shape(shape: Shape | None) -> tuple[int, ...] | None:
    return shape if shape is not None and all(isinstance(n, int) for n in shape) else None


Rule = Callable[[Node, tuple[int, ...]], list[Step] | None]
"""The steps of a view from its node and the shape of what it views; None where it is no view."""


def _permute(dims: Callable[[Node, int], tuple[int, ...]]) -> Rule:
    def steps(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
        n = len(shape)
        return [Permute(tuple(d % n for d in dims(node, n)))]

    return steps


def _swapped(node: Node, n: int) -> tuple[int, ...]:
    order = list(range(n))
    i, j = int(argument(node, "dim0")) % n, int(argument(node, "dim1")) % n
    order[i], order[j] = order[j], order[i]
    return tuple(order)


def _reshape(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    # an expand that repeats is no view of the weight: each element is read several times
    out = static_shape(shape_of(node))
    return [Reshape(out)] if out is not None and numel(out) == numel(shape) else None


def _cast(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    before, after = value(node.args[0]), value(node)
    return [] if before.dtype == after.dtype else [Cast(dtype_name(after.dtype))]


def _slice(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    axis = int(argument(node, "dim", 0)) % len(shape)
    out, start, step = (
        static_shape(shape_of(node)),
        argument(node, "start"),
        argument(node, "step", 1),
    )
    if out is None or step != 1 or not isinstance(start, int | None):
        return None
    first = slice(start, None).indices(shape[axis])[0]
    return [Slice(axis, first, first + out[axis])]


def _select(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    i = argument(node, "index")
    return _one(node, shape, i) if isinstance(i, int) else None  # another one is computed


def _one(node: Node, shape: tuple[int, ...], i: int) -> list[Step]:
    """The steps to one place along the op's axis, which goes."""
    axis = int(argument(node, "dim", 0)) % len(shape)
    i %= shape[axis]
    return [Slice(axis, i, i + 1), Reshape(shape[:axis] + shape[axis + 1 :])]


def _item(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    """A part of a split, chunk or unbind: the slice behind the sizes of the parts before it."""
    parent, i = node.args
    if not isinstance(parent, Node) or not isinstance(i, int):
        return None
    if parent.target is aten.unbind.int:
        return _one(parent, shape, i)
    axis = int(argument(parent, "dim", 0)) % len(shape)
    sizes = [int(v.shape[axis]) for v in value(parent)]
    i %= len(sizes)
    start = sum(sizes[:i])
    return [Slice(axis, start, start + sizes[i])]


def gather(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    """A choice along the first axis by data, as a router makes it among stacked matrices.

    Without it, the experts of a mixture in batched form are no weights and go unreached.
    """
    one = node.target is aten.index_select.default and int(argument(node, "dim")) == 0
    if node.target is aten.index.Tensor:
        ids = node.args[1]
        lone = isinstance(ids, (tuple, list)) and len(ids) == 1 and isinstance(ids[0], Node)
        one = lone and len(shape_of(ids[0]) or ()) == 1  # type: ignore[index]
    return [Gather(0)] if one and len(shape) > 2 else None


SPLITS = aten_ops(
    "split.Tensor split.sizes split_with_sizes chunk unbind.int tensor_split.sections"
)


_reversed = _permute(lambda node, n: tuple(range(n))[::-1])


_last_two = _permute(lambda node, n: (*range(n - 2), n - 1, n - 2))


def _adjoint(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    # conjugated, it is another tensor
    return None if value(node).is_complex() else _last_two(node, shape)


_RESHAPES = aten_ops(
    "view reshape _unsafe_view flatten.using_ints unflatten.int squeeze squeeze.dim squeeze.dims "
    "unsqueeze expand"
)


VIEWS: Mapping[object, Rule] = {
    **dict.fromkeys(aten_ops("t numpy_T"), _reversed),
    aten.mT.default: _last_two,
    **dict.fromkeys(aten_ops("adjoint matrix_H"), _adjoint),
    aten.transpose.int: _permute(_swapped),
    aten.permute.default: _permute(lambda node, n: tuple(argument(node, "dims"))),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(aten_ops("slice.Tensor narrow"), _slice),
    aten.select.int: _select,
    operator.getitem: _item,
    **dict.fromkeys(
        aten_ops("to.dtype to.dtype_layout to.device to.other type_as _to_copy"), _cast
    ),
    aten.dropout.default: lambda node, shape: None if argument(node, "train") else [],
    **dict.fromkeys(
        aten_ops("contiguous clone detach alias lift_fresh_copy"), lambda node, shape: []
    ),
}


def is_view(node: fx.Node) -> bool:
    """Whether a node only views its operand."""
    return node.target in VIEWS or node.target in SPLITS
