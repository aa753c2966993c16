"""The ONNX ops that may stand between a weight and its use, as View steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from lora_fx.ir.layout import Cast, Gather, Permute, Reshape, Slice, Step
from lora_fx.onnx.graph.marks import DATA
from lora_fx.onnx.graph.values import constant, dtype_name, numbers, rank, shape_of, tensor_dtype

Steps = list[Step] | None
Rule = Callable[[ir.Node, tuple[int, ...], int], Steps]
"""A rule takes the node, the shape of its first operand, and which of its results is meant; it
gives the steps, or None where the node is no view."""


def _transpose(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    perm = node.attributes.get("perm")
    return [Permute(tuple(perm.as_ints()) if perm else tuple(range(len(shape)))[::-1])]


def _cast(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    to = tensor_dtype(ir.DataType(node.attributes["to"].as_int()))
    if "float" not in to:
        return None
    return [] if to == dtype_name(node.inputs[0]) else [Cast(to)]


def _reshape(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    wanted = numbers(node, "shape", 1)
    if wanted is None:
        return None
    # Reshape: a size of 0 copies that of the input, unless allowzero says that it is 0.
    keep_zero = node.attributes.get_int("allowzero", 0)
    sizes = [shape[k] if n == 0 and not keep_zero else n for k, n in enumerate(wanted)]
    rest = math.prod(n for n in sizes if n != -1)
    whole = math.prod(shape)
    return [Reshape(tuple(whole // rest if n == -1 else n for n in sizes))] if rest else None


def _squeeze(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    axes = numbers(node, "axes", 1, [k for k, n in enumerate(shape) if n == 1])
    if axes is None:
        return None
    gone = {a % len(shape) for a in axes}
    return [Reshape(tuple(n for k, n in enumerate(shape) if k not in gone))]


def _unsqueeze(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    axes = numbers(node, "axes", 1)
    if axes is None:
        return None
    rank = len(shape) + len(axes)
    new, rest = {a % rank for a in axes}, iter(shape)
    return [Reshape(tuple(1 if k in new else next(rest) for k in range(rank)))]


def _flatten(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    at = node.attributes.get_int("axis", 1)
    return [Reshape((math.prod(shape[:at]), math.prod(shape[at:])))]


def _expand(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    wanted = numbers(node, "shape", 1)
    if wanted is None:
        return None
    out = np.broadcast_shapes(shape, tuple(wanted))
    return [Reshape(out)] if math.prod(out) == math.prod(shape) else None


def _slice(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    starts, stops = numbers(node, "starts", 1), numbers(node, "ends", 2)
    if starts is None or stops is None:
        return None
    axes = numbers(node, "axes", 3, list(range(len(starts))))
    if axes is None or set(numbers(node, "steps", 4, [1]) or ()) != {1}:
        return None
    steps: list[Step] = []
    for axis, start, stop in zip(axes, starts, stops, strict=True):
        # Python's slices clamp as ONNX does: ends are often INT64_MAX
        lo, hi, _ = slice(start, stop).indices(shape[axis])
        steps.append(Slice(axis % len(shape), lo, hi))
    return steps


def _split(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    axis = node.attributes.get_int("axis", 0) % len(shape)
    # without sizes, all parts are equal and the last may be shorter
    part = -(-shape[axis] // len(node.outputs))
    equal = [min(part, shape[axis] - part * k) for k in range(len(node.outputs))]
    sizes = numbers(node, "split", 1, equal)
    if sizes is None:
        return None
    start = sum(sizes[:i])
    return [Slice(axis, start, start + sizes[i])]


def _gather(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    """The slice of one entry of an axis that a constant picks; ids from data pick matrices."""
    value = node.inputs[1]
    ids = None if value is None or DATA in value.metadata_props else constant(value)
    axis = node.attributes.get_int("axis", 0) % len(shape)
    if ids is None or ids.ndim:
        return _picked(node, shape, 1) if ids is None and axis == 0 else None
    k = int(ids) % shape[axis]
    return [Slice(axis, k, k + 1), Reshape(shape[:axis] + shape[axis + 1 :])]


def _gather_nd(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    batched = node.attributes.get_int("batch_dims", 0)
    one = (shape_of(node.inputs[1]) or (0,))[-1] == 1
    return _picked(node, shape, 2) if one and not batched else None


def _picked(node: ir.Node, shape: tuple[int, ...], dims: int) -> Steps:
    """Stacked matrices that data picks along the first axis; ids of other ranks make new axes."""
    return [Gather(0)] if rank(node.inputs[1]) == dims and len(shape) > 2 else None


VIEWS: Mapping[str, Rule] = {
    "Identity": lambda node, shape, i: [],
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
            shape = tuple(shape[d] for d in step.perm)
        elif isinstance(step, Reshape):
            shape = step.shape
        elif isinstance(step, Slice):
            shape = (*shape[: step.axis], step.stop - step.start, *shape[step.axis + 1 :])
    return shape
