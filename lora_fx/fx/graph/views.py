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
    """A shape whose sizes are all numbers; None for another, and for none."""
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return shape


Rule = Callable[[Node, tuple[int, ...]], list[Step] | None]
"""The steps of a view, from its node and the shape of its operand; None if it is not a view."""


def _permute(dims: Callable[[Node, int], tuple[int, ...]]) -> Rule:
    def steps(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
        n_axes = len(shape)
        return [Permute(tuple(axis % n_axes for axis in dims(node, n_axes)))]

    return steps


def _swapped(node: Node, n_axes: int) -> tuple[int, ...]:
    order = list(range(n_axes))
    first = int(argument(node, "dim0")) % n_axes
    second = int(argument(node, "dim1")) % n_axes
    order[first] = second
    order[second] = first
    return tuple(order)


def _reshape(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    # an expand that repeats is no view of the weight: each element is read several times
    out = static_shape(shape_of(node))
    if out is None or numel(out) != numel(shape):
        return None
    return [Reshape(out)]


def _cast(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    before = value(node.args[0]).dtype
    after = value(node).dtype
    if before == after:
        return []
    return [Cast(dtype_name(after))]


def _slice(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    axis = int(argument(node, "dim", 0)) % len(shape)
    out = static_shape(shape_of(node))
    start = argument(node, "start")
    if out is None or argument(node, "step", 1) != 1 or not isinstance(start, int | None):
        return None
    first, _, _ = slice(start, None).indices(shape[axis])
    return [Slice(axis, first, first + out[axis])]


def _select(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    index = argument(node, "index")
    if not isinstance(index, int):  # it is computed
        return None
    return _selected(node, shape, index)


def _selected(node: Node, shape: tuple[int, ...], index: int) -> list[Step]:
    """The steps to one place along the op's axis, which the result lacks."""
    axis = int(argument(node, "dim", 0)) % len(shape)
    index %= shape[axis]
    without_axis = shape[:axis] + shape[axis + 1 :]
    return [Slice(axis, index, index + 1), Reshape(without_axis)]


def _item(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    """One result of a split, chunk or unbind: the slice behind the sizes of those before it."""
    parent, index = node.args
    if not isinstance(parent, Node) or not isinstance(index, int):
        return None
    if parent.target is aten.unbind.int:
        return _selected(parent, shape, index)
    axis = int(argument(parent, "dim", 0)) % len(shape)
    sizes = [int(result.shape[axis]) for result in value(parent)]
    index %= len(sizes)
    start = sum(sizes[:index])
    return [Slice(axis, start, start + sizes[index])]


def gather(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    """A choice along the first axis by data, as a router makes it among stacked matrices.

    Without it, the experts of a mixture in batched form are no weights and go unreached.
    """
    if len(shape) <= 2:
        return None
    if node.target is aten.index_select.default:
        return [Gather(0)] if int(argument(node, "dim")) == 0 else None
    if node.target is aten.index.Tensor and _is_list_of_ids(node.args[1]):
        return [Gather(0)]
    return None


def _is_list_of_ids(indices: object) -> bool:
    """Whether an index is one tensor [n], for the first axis alone."""
    if not isinstance(indices, (tuple, list)) or len(indices) != 1:
        return False
    return isinstance(indices[0], Node) and len(shape_of(indices[0]) or ()) == 1


SPLITS = aten_ops(
    "split.Tensor split.sizes split_with_sizes chunk unbind.int tensor_split.sections"
)


_reversed = _permute(lambda node, n_axes: tuple(range(n_axes))[::-1])


_last_two = _permute(lambda node, n_axes: (*range(n_axes - 2), n_axes - 1, n_axes - 2))


def _adjoint(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    if value(node).is_complex():  # conjugated, it is another tensor
        return None
    return _last_two(node, shape)


_RESHAPES = aten_ops(
    "view reshape _unsafe_view flatten.using_ints unflatten.int squeeze squeeze.dim squeeze.dims "
    "unsqueeze expand"
)


VIEWS: Mapping[object, Rule] = {
    **dict.fromkeys(aten_ops("t numpy_T"), _reversed),
    aten.mT.default: _last_two,
    **dict.fromkeys(aten_ops("adjoint matrix_H"), _adjoint),
    aten.transpose.int: _permute(_swapped),
    aten.permute.default: _permute(lambda node, n_axes: tuple(argument(node, "dims"))),
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
