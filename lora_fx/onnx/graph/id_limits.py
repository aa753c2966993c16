"""How far the integers of an input may go: up to the rows of the table that it indexes.

A sample or a user's number above them would be refused by the runtime.
"""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.ir.kinds import Embedding
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.text import by_key

SAME_NUMBERS = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose",
                "Slice", "Expand", "Gather", "GatherND"}  # fmt: skip
"""Ops whose outputs are elements of their first input."""


def highest(graph: OnnxGraph) -> dict[str, int]:
    """For each input that indexes tables, the rows of the smallest of them."""
    lookups = (s for s in graph.sites() if isinstance(s.kind, Embedding))
    tables = by_key((_input(graph.activation(s), graph.model), s.operand[0]) for s in lookups)
    return {name: min(rows) for name, rows in tables.items() if name is not None}


def _input(value: ir.Value | None, model: ir.Model) -> str | None:
    while value is not None:
        node = value.producer()
        if node is None:
            return value.name if value in model.graph.inputs else None
        if node.op_type not in SAME_NUMBERS:
            return None
        value = node.inputs[0]
    return None
