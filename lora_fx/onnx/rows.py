"""Row provenance: which axis of each value holds the rows of a batch, in the order of the inputs.

A walk over the graph takes the batch axis of the inputs through every op that keeps rows apart:

    axis 0, exact   [batch, …]            dimension 0 is the batch
    axis 0, merged  [batch · k, …]        rows were flattened, batch outermost (gpt2's Conv1D, Swin)
    axis k, exact   [.., batch, ..]       behind a Transpose
    no axis         the same for every row: tables, masks made from sizes

Where the batch is outermost in memory, any Reshape leaves it so. An op that is not in the table,
or that reads across the batch axis (a sort of rows, a mean over the batch, an expert's Gather),
ends the trail with a reason. The walk is a claim; the export that uses it proves it by running.
"""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.onnx.row_rules import FIRST, RULES, SAME, Rows, States


def provenance(model: ir.Model, batch: str) -> dict[ir.Value, Rows]:
    """Rows of every value of the main graph; `batch` is the symbol of the inputs' dimension 0."""
    states: dict[ir.Value, Rows] = {}
    for value in model.graph.inputs:
        first = str(value.shape[0]) if value.shape else ""
        states[value] = FIRST if first == batch else SAME
    for node in model.graph:
        ins = [states.get(v, SAME) for v in node.inputs if v is not None]
        lost = next((s.lost for s in ins if s.lost), "")
        for i, out in enumerate(node.outputs):
            if node.op_type in ("Shape", "Size"):
                states[out] = SAME
            elif lost:
                states[out] = Rows(lost=lost)
            elif _has_body(node) or any(s.axis is not None for s in ins):
                states[out] = _after(node, states, i, batch)
            else:
                states[out] = SAME
    return states


def _has_body(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(a.type in kinds for a in node.attributes.values())


def _after(node: ir.Node, states: States, i: int, batch: str) -> Rows:
    rule = None if node.domain else RULES.get(node.op_type)
    found = None if rule is None else rule(node, states, i, batch)
    if found is None:
        return Rows(lost=f"{node.op_type} {node.outputs[0].name!r} may mix the rows of the batch")
    return found
