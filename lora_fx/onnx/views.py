"""What keeps a weight a weight: ONNX ops between a tensor and its use, as View steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.ir.view import Cast, Permute, Reshape, Slice, Step

Steps = list[Step] | None
Rule = Callable[[ir.Node, tuple[int, ...], int], Steps]
"""(node, shape of its first operand, which result) → steps, or None where it is no view."""


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initialiser or a Constant; None for anything else."""
    if value is None:
        return None
    if value.const_value is not None and not value.is_graph_input():
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return None
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor().numpy()
        if name in ("value_int", "value_ints", "value_float", "value_floats"):
            kind = np.int64 if "int" in name else np.float32
            return np.array(attribute.value, kind)
    return None


def numbers(node: ir.Node, name: str, slot: int) -> list[int] | None:
    """Whole numbers that an op takes as an attribute, or since a later opset as an operand."""
    if name in node.attributes:
        found = node.attributes[name].value
        return [int(found)] if isinstance(found, int) else [int(n) for n in found]
    if slot >= len(node.inputs):
        return None
    value = constant(node.inputs[slot])
    return None if value is None else [int(n) for n in value.reshape(-1)]


def dtype_name(value: ir.Value | None) -> str:
    """float32, bfloat16 …; empty where the model does not say."""
    dtype = None if value is None else value.dtype
    if dtype is None and value is not None and value.const_value is not None:
        dtype = value.const_value.dtype
    return "" if dtype is None else tensor_dtype(dtype)


def tensor_dtype(dtype: ir.DataType) -> str:
    """A dtype's name as numpy has it, or ONNX's own where numpy has none."""
    try:
        return str(dtype.numpy().name)
    except (TypeError, KeyError):
        return dtype.name.lower()


def _same(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    return []


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
    keep_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int()
    sizes = [shape[k] if n == 0 and not keep_zero else n for k, n in enumerate(wanted)]
    rest = math.prod(n for n in sizes if n != -1)
    whole = math.prod(shape)
    return [Reshape(tuple(whole // rest if n == -1 else n for n in sizes))] if rest else None


def _squeeze(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    axes = numbers(node, "axes", 1)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        return None
    gone = {a % len(shape) for a in axes} if axes is not None else None
    kept = (n for k, n in enumerate(shape) if (n != 1 if gone is None else k not in gone))
    return [Reshape(tuple(kept))]


def _unsqueeze(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    axes = numbers(node, "axes", 1)
    if axes is None:
        return None
    rank = len(shape) + len(axes)
    new, rest = {a % rank for a in axes}, iter(shape)
    return [Reshape(tuple(1 if k in new else next(rest) for k in range(rank)))]


def _flatten(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    at = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    at = at + len(shape) if at < 0 else at
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
    axes = numbers(node, "axes", 3)
    if axes is None:
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            return None
        axes = list(range(len(starts)))
    strides = numbers(node, "steps", 4)
    if len(node.inputs) > 4 and node.inputs[4] is not None and set(strides or (0,)) != {1}:
        return None
    steps: list[Step] = []
    for axis, start, stop in zip(axes, starts, stops, strict=True):
        lo, hi, _ = slice(start, stop).indices(shape[axis])
        steps.append(Slice(axis % len(shape), lo, hi))
    return steps


def _split(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    axis %= len(shape)
    sizes = numbers(node, "split", 1)
    if sizes is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            return None
        part = -(-shape[axis] // len(node.outputs))
        sizes = [min(part, shape[axis] - part * k) for k in range(len(node.outputs))]
    start = sum(sizes[:i])
    return [Slice(axis, start, start + sizes[i])]


def _gather(node: ir.Node, shape: tuple[int, ...], i: int) -> Steps:
    """One entry of an axis, picked by a constant: no lookup."""
    ids = constant(node.inputs[1])
    if ids is None or ids.ndim:
        return None
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % len(shape)
    k = int(ids) % shape[axis]
    return [Slice(axis, k, k + 1), Reshape(shape[:axis] + shape[axis + 1 :])]


VIEWS: Mapping[str, Rule] = {
    "Identity": _same,
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
}


def after(shape: tuple[int, ...], steps: list[Step]) -> tuple[int, ...]:
    """The shape that steps leave."""
    for step in steps:
        if isinstance(step, Permute):
            shape = tuple(shape[d] for d in step.dims)
        elif isinstance(step, Reshape):
            shape = step.shape
        elif isinstance(step, Slice):
            shape = (*shape[: step.axis], step.stop - step.start, *shape[step.axis + 1 :])
    return shape
