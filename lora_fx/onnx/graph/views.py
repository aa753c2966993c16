"""The ONNX ops that may come between a weight and its use, as View steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from lora_fx.ir.view import Cast, Gather, Permute, Reshape, Slice, Step
from lora_fx.onnx.graph.marks import DATA
from lora_fx.onnx.graph.values import constant, dtype_name, numbers, rank, shape_of, tensor_dtype

Steps = list[Step] | None
Rule = Callable[[ir.Node, tuple[int, ...], int], Steps]
"""A rule takes the node, the shape of its first operand, and which of its results is meant; it
gives the steps, or None where the node is no view."""


def _identity(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    return []


def _transpose(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    perm = node.attributes.get("perm")
    if perm is None:
        return [Permute(tuple(reversed(range(len(shape)))))]
    return [Permute(tuple(perm.as_ints()))]


def _cast(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    dtype = tensor_dtype(ir.DataType(node.attributes["to"].as_int()))
    if "float" not in dtype:
        return None
    if dtype == dtype_name(node.inputs[0]):
        return []
    return [Cast(dtype)]


def _reshape(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    sizes = numbers(node, "shape", 1)
    if sizes is None:
        return None
    # a size of 0 copies that of the input, unless allowzero says that it is 0
    if not node.attributes.get_int("allowzero", 0):
        sizes = [shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    stated_elements = math.prod(size for size in sizes if size != -1)
    if not stated_elements:
        return None
    inferred_size = math.prod(shape) // stated_elements
    return [Reshape(tuple(inferred_size if size == -1 else size for size in sizes))]


def _squeeze(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    axes_of_one = [axis for axis, size in enumerate(shape) if size == 1]
    axes = numbers(node, "axes", 1, axes_of_one)
    if axes is None:
        return None
    squeezed = {axis % len(shape) for axis in axes}
    return [Reshape(tuple(size for axis, size in enumerate(shape) if axis not in squeezed))]


def _unsqueeze(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    axes = numbers(node, "axes", 1)
    if axes is None:
        return None
    dimensions = len(shape) + len(axes)
    inserted = {axis % dimensions for axis in axes}
    sizes = iter(shape)
    return [Reshape(tuple(1 if axis in inserted else next(sizes) for axis in range(dimensions)))]


def _flatten(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    axis = node.attributes.get_int("axis", 1)
    return [Reshape((math.prod(shape[:axis]), math.prod(shape[axis:])))]


def _expand(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    sizes = numbers(node, "shape", 1)
    if sizes is None:
        return None
    expanded = np.broadcast_shapes(shape, tuple(sizes))
    if math.prod(expanded) != math.prod(shape):
        return None
    return [Reshape(expanded)]


def _slice(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    starts = numbers(node, "starts", 1)
    stops = numbers(node, "ends", 2)
    if starts is None or stops is None:
        return None
    axes = numbers(node, "axes", 3, list(range(len(starts))))
    strides = numbers(node, "steps", 4, [1])
    if axes is None or strides is None or set(strides) != {1}:
        return None
    steps: list[Step] = []
    for axis, start, stop in zip(axes, starts, stops, strict=True):
        # Python's slices clamp as ONNX does: ends are often INT64_MAX
        first, end, _ = slice(start, stop).indices(shape[axis])
        steps.append(Slice(axis % len(shape), first, end))
    return steps


def _split(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    axis = node.attributes.get_int("axis", 0) % len(shape)
    # without sizes, all parts are equal and the last may be shorter
    count = len(node.outputs)
    size = -(-shape[axis] // count)
    equal_sizes = [min(size, shape[axis] - size * i) for i in range(count)]
    sizes = numbers(node, "split", 1, equal_sizes)
    if sizes is None:
        return None
    start = sum(sizes[:output])
    return [Slice(axis, start, start + sizes[output])]


def _gather(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    """The slice of one entry of an axis that a constant picks; ids from data pick matrices."""
    value = node.inputs[1]
    ids = None
    if value is not None and DATA not in value.metadata_props:
        ids = constant(value)
    axis = node.attributes.get_int("axis", 0) % len(shape)
    if ids is None:
        return _picked(node, shape, 1) if axis == 0 else None
    if ids.ndim:
        return None
    entry = int(ids) % shape[axis]
    return [Slice(axis, entry, entry + 1), Reshape(shape[:axis] + shape[axis + 1 :])]


def _gather_nd(node: ir.Node, shape: tuple[int, ...], output: int) -> Steps:
    """Stacked matrices that data picks, where each index names one entry of the first axis."""
    if node.attributes.get_int("batch_dims", 0):
        return None
    ids_shape = shape_of(node.inputs[1])
    if not ids_shape or ids_shape[-1] != 1:
        return None
    return _picked(node, shape, 2)


def _picked(node: ir.Node, shape: tuple[int, ...], id_rank: int) -> Steps:
    """Stacked matrices that data picks along the first axis; ids of other ranks make new axes."""
    if rank(node.inputs[1]) != id_rank or len(shape) <= 2:
        return None
    return [Gather(0)]


VIEWS: Mapping[str, Rule] = {
    "Identity": _identity,
    "Transpose": _transpose,
    "Cast": _cast,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherND": _gather_nd,
}


def after(shape: tuple[int, ...], steps: list[Step]) -> tuple[int, ...]:
    """The shape that a tensor has after some steps."""
    for step in steps:
        if isinstance(step, Permute):
            shape = tuple(shape[axis] for axis in step.perm)
        elif isinstance(step, Reshape):
            shape = step.shape
        elif isinstance(step, Slice):
            shape = (*shape[: step.axis], step.stop - step.start, *shape[step.axis + 1 :])
    return shape
