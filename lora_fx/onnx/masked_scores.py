"""Attention masks that add −∞ as in torch, instead of the dtype's least number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.emitter import add_initialiser
from lora_fx.onnx.graph.new_names import NewNames
from lora_fx.onnx.graph.values import constant, delete_unread, made_by

LOWEST = -6e4
"""The upper bound of numbers that count as a mask: float16's least number is −65504."""


def mask_by_infinity(model: ir.Model) -> None:
    """Replace the number that a boolean mask adds to excluded scores by −∞.

    The exporter adds the least number of the dtype. A row that is masked everywhere, as the padding
    before a prompt is, then is the mean of all values. In torch it is 0, which the nodes IsNaN and
    Where behind the softmax make of −∞: its softmax is 0/0.
    """
    names = NewNames(model)
    for node in list(model.graph.all_nodes()):
        for value in _masked_sum(node):
            where = made_by(value, "Where")
            if where is None:
                continue
            least = where.inputs[2]
            low = constant(least)
            if low is not None and low.size == 1 and low.item() < LOWEST:
                name = names.take(f"{where.outputs[0].name}_left_out")
                infinity = np.full(low.shape, -np.inf, low.dtype)
                where.replace_input_with(2, add_initialiser(model.graph, name, infinity))
                delete_unread(least)


def _masked_sum(node: ir.Node) -> Sequence[ir.Value | None]:
    """Return the terms of the Add in IsNaN(Softmax(Add(scores, mask))); none for other nodes."""
    if node.op_type != "IsNaN":
        return ()
    softmax = made_by(node.inputs[0], "Softmax")
    if softmax is None:
        return ()
    add = made_by(softmax.inputs[0], "Add")
    return () if add is None else add.inputs
