"""Pad(x, before, after, v) of integers → Concat(v…, x, v…) along each padded axis, for devices.

CUDA pads floats alone, so integers, such as the labels of a training step, which are shifted by one
token, would be copied to the host and back in every run. Expand and Concat move bytes of any dtype:

    along axis k: Concat(Expand(v, [n₀ … before … ]), x, Expand(v, [n₀ … after … ]), axis = k)

where n₀ … are the sizes of x. One axis follows the other, so corners are v as well. Cuts (numbers
below zero), other modes than constant, amounts that are computed and none at all stay as they are,
and so do pads of sizes, which are on the host, and those of older opsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.emitter import add_initialiser
from lora_fx.onnx.graph.new_names import NewNames
from lora_fx.onnx.graph.values import delete_unread, numbers, operand, rank
from lora_fx.onnx.host_sizes import host_sizes

OLDEST = 15
"""The oldest opset in which Shape returns the sizes of some axes."""


@dataclass(frozen=True)
class PadToConcat(ir.passes.InPlacePass):
    """A rewrite of pads of integers by constant amounts."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        if model.opset_imports.get("", 0) < OLDEST:
            return ir.passes.PassResult(model, False)
        sizes = host_sizes(model.graph)
        names: NewNames | None = None
        for pad in list(model.graph):
            if not _pads_integers(pad) or pad.inputs[0] in sizes:
                continue
            amounts = _amounts(pad)
            if amounts is not None:
                names = names or NewNames(model)
                _replace(model.graph, pad, amounts, names)
        return ir.passes.PassResult(model, names is not None)


def _pads_integers(node: ir.Node) -> bool:
    """Whether a node is a Pad for whose dtype CUDA has no kernel."""
    if node.domain or node.op_type != "Pad":
        return False
    value = node.inputs[0]
    return value is not None and value.dtype is not None and value.dtype.is_integer()


def _amounts(pad: ir.Node) -> Sequence[tuple[int, int]] | None:
    """Return by how much each axis is padded before and after; None for pads that stay."""
    dimensions = rank(pad.inputs[0])
    if dimensions is None or pad.attributes.get_string("mode", "constant") != "constant":
        return None
    pads = numbers(pad, "pads", 1)
    axes = numbers(pad, "axes", 3, [*range(dimensions)])
    if pads is None or axes is None or min(pads, default=0) < 0 or not any(pads):
        return None
    amounts = [(0, 0)] * dimensions
    for i, axis in enumerate(axes):
        amounts[axis] = (pads[i], pads[i + len(axes)])
    return amounts


def _replace(
    graph: ir.Graph, pad: ir.Node, amounts: Sequence[tuple[int, int]], names: NewNames
) -> None:
    """Replace a Pad by a Concat for each padded axis."""
    result = pad.outputs[0]
    x = pad.inputs[0]
    value = operand(pad, 2)
    assert x is not None and x.dtype is not None
    if value is None:
        zero = np.zeros((), x.dtype.numpy())
        value = add_initialiser(graph, names.take(f"{result.name}_value"), zero)

    nodes: list[ir.Node] = []
    for axis, (before, after) in enumerate(amounts):
        parts = [x]
        for place, length, side in ((0, before, "before"), (2, after, "after")):
            if length:
                stem = f"{result.name}_{side}_{axis}"
                filled = _filled(graph, value, x, axis, length, stem, names)
                parts.insert(place, filled[-1].outputs[0])
                nodes += filled
        if len(parts) > 1:
            name = names.take(f"{result.name}_axis_{axis}")
            nodes.append(_node("Concat", parts, name, x, axis=axis))
            x = nodes[-1].outputs[0]
    operands = pad.inputs
    ir.convenience.replace_nodes_and_values(graph, pad, [pad], nodes, [result], [x])
    for amount in operands[1:]:
        delete_unread(amount)


def _filled(
    graph: ir.Graph,
    value: ir.Value,
    x: ir.Value,
    axis: int,
    length: int,
    stem: str,
    names: NewNames,
) -> list[ir.Node]:
    """Return nodes that expand a value to the sizes of x, but for the length of one axis."""
    size = add_initialiser(graph, names.take(f"{stem}_length"), np.array([length], np.int64))
    nodes: list[ir.Node] = []
    sizes = [size]
    if axis > 0:
        name = names.take(f"{stem}_sizes_to")
        nodes.append(_node("Shape", [x], name, size, start=0, end=axis))
        sizes.insert(0, nodes[-1].outputs[0])
    name = names.take(f"{stem}_sizes_from")
    nodes.append(_node("Shape", [x], name, size, start=axis + 1))
    sizes.append(nodes[-1].outputs[0])
    nodes.append(_node("Concat", sizes, names.take(f"{stem}_sizes"), size, axis=0))
    nodes.append(_node("Expand", [value, nodes[-1].outputs[0]], names.take(stem), x))
    return nodes


def _node(
    op_type: str, inputs: Sequence[ir.Value], name: str, like: ir.Value, **attributes: int
) -> ir.Node:
    """Return a node whose result has the dtype of a value."""
    node = ir.node(op_type, inputs, attributes, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(like.dtype) if like.dtype is not None else None
    return node
