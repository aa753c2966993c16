"""What keeps a weight a weight: ATen ops between a parameter and its use, as View steps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from lora_fx.fx.nodes import Shape, argument, dtype_name, numel, shape_of, value
from lora_fx.ir.view import Cast, Gather, Permute, Reshape, Slice, Step

aten = torch.ops.aten


def _static(shape: Shape | None) -> tuple[int, ...] | None:
    return shape if shape is not None and all(isinstance(n, int) for n in shape) else None


def _same(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    return []


def _permute(dims: Callable[[Node, int], tuple[int, ...]]) -> Any:
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
    out = _static(shape_of(node))
    return None if out is None else [Reshape(out)]


def _expand(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    out = _static(shape_of(node))
    return [Reshape(out)] if out is not None and numel(out) == numel(shape) else None


def _cast(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    before, after = value(node.args[0]), value(node)
    return [] if before.dtype == after.dtype else [Cast(dtype_name(after.dtype))]


def _slice(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    axis = int(argument(node, "dim", 0)) % len(shape)
    n, out = shape[axis], _static(shape_of(node))
    start, step = argument(node, "start"), argument(node, "step", 1)
    start = 0 if start is None else start
    if out is None or step != 1 or not isinstance(start, int):
        return None
    start = min(max(start + n if start < 0 else start, 0), n)
    return [Slice(axis, start, start + out[axis])]


def _select(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    axis, i = int(argument(node, "dim", 0)) % len(shape), argument(node, "index")
    if not isinstance(i, int):
        return None
    i %= shape[axis]
    return [Slice(axis, i, i + 1), Reshape(shape[:axis] + shape[axis + 1 :])]


def _item(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    """Getitem of split, chunk or unbind: a slice at the sum of the sizes before it."""
    parent, i = node.args
    if not isinstance(parent, Node) or not isinstance(i, int):
        return None
    axis = int(argument(parent, "dim", 0)) % len(shape)
    if parent.target is aten.unbind.int:
        i %= shape[axis]
        return [Slice(axis, i, i + 1), Reshape(shape[:axis] + shape[axis + 1 :])]
    sizes = [int(v.shape[axis]) for v in value(parent)]
    i %= len(sizes)
    start = sum(sizes[:i])
    return [Slice(axis, start, start + sizes[i])]


def gather(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    """An index of the first axis by data: which matrices of a stack take part."""
    if len(shape) < 3:
        return None
    if node.target is aten.index.Tensor:
        ids = node.args[1]
        lone = isinstance(ids, (tuple, list)) and len(ids) == 1 and isinstance(ids[0], Node)
        one = lone and len(shape_of(ids[0]) or ()) == 1  # type: ignore[index]
        return [Gather(0)] if one else None
    if node.target is aten.index_select.default and int(argument(node, "dim")) == 0:
        return [Gather(0)]
    return None


def _dropout(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    return None if argument(node, "train") else []


SPLITS = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.tensor_split.sections,
}
_reversed = _permute(lambda node, n: tuple(range(n))[::-1])
_last_two = _permute(lambda node, n: (*range(n - 2), n - 1, n - 2))
VIEWS: Mapping[Any, Callable[[Node, tuple[int, ...]], list[Step] | None]] = {
    aten.t.default: _reversed,
    aten.numpy_T.default: _reversed,
    aten.mT.default: _last_two,
    aten.adjoint.default: _last_two,
    aten.matrix_H.default: _last_two,
    aten.transpose.int: _permute(_swapped),
    aten.permute.default: _permute(lambda node, n: tuple(argument(node, "dims"))),
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.narrow.default: lambda node, shape: [
        Slice(
            int(node.args[1]) % len(shape),  # type: ignore[arg-type]
            int(node.args[2]),  # type: ignore[arg-type]
            int(node.args[2]) + int(node.args[3]),  # type: ignore[arg-type]
        )
    ],
    aten.select.int: _select,
    operator.getitem: _item,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.device: _cast,
    aten.to.other: _cast,
    aten.type_as.default: _cast,
    aten._to_copy.default: _cast,
    aten.dropout.default: _dropout,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.lift_fresh_copy.default: _same,
}
