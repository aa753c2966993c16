"""Masks of attention in the files that torch's exporter writes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.flow import constant
from lora_fx.onnx.graph.graph import add_initialiser

LOWEST = -6e4
"""Scores are above it: float16's least number is −65504."""


def mask_by_infinity(model: ir.Model) -> None:
    """Let a boolean mask add −∞ to the scores that it leaves out.

    The exporter adds the least number of the dtype. A row that is masked everywhere, as the padding
    before a prompt is, then is the mean of all values. In torch it is 0, which the nodes IsNaN and
    Where behind the softmax make of −∞: its softmax is 0/0.
    """
    for node in list(model.graph.all_nodes()):
        softmax = node.inputs[0].producer() if node.op_type == "IsNaN" and node.inputs[0] else None
        scores = softmax.inputs[0] if softmax is not None and softmax.op_type == "Softmax" else None
        added = scores.producer() if scores is not None else None
        for value in added.inputs if added is not None and added.op_type == "Add" else ():
            where = value.producer() if value is not None else None
            if where is None or where.op_type != "Where":
                continue
            low = constant(where.inputs[2])
            if low is not None and low.size == 1 and low.item() < LOWEST:
                name = f"{where.outputs[0].name}_left_out"
                infinity = np.full(low.shape, -np.inf, low.dtype)
                where.replace_input_with(2, add_initialiser(model.graph, name, infinity))
