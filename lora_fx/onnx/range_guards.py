"""The sizes that a file is true for: in its metadata, and as nodes that fail at other sizes.

A guard is a Reshape of an input to its own shape, or where the condition does not hold to

    shape' = shape + (shape + 1) · broken

which has another number of elements. ONNX has no assertion; a Reshape compares the two numbers on
the host, on the CPU as with CUDA, and its name, which the runtime's error quotes, says what is
wrong. A Gather out of range fails on the CPU only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError
from lora_fx.files.strict_json import json_value

RANGES = "lora_fx.ranges"
GUARD = "lora_fx holds for "
_OPS = {
    "Add": "Add", "Sub": "Sub", "Mult": "Mul", "Mod": "Mod", "min": "Min", "max": "Max",
    "Lt": "Less", "LtE": "LessOrEqual", "Gt": "Greater", "GtE": "GreaterOrEqual", "Eq": "Equal",
    "Or": "Or", "And": "And",
}  # fmt: skip


def say_within(model: ir.Model, conditions: Sequence[Condition]) -> None:
    """Write conditions on a model's inputs into its metadata, unless it already has some."""
    stored = [condition.stored() for condition in _on_inputs(model, conditions)]
    if stored:
        model.metadata_props.setdefault(RANGES, json.dumps(stored))


def guard_within(model: ir.Model, conditions: Sequence[Condition]) -> None:
    """Put nodes in that fail where one of the conditions does not hold; once for a model."""
    if any(str(node.name).startswith(GUARD) for node in model.graph):
        return
    inputs = {str(value.name): value for value in model.graph.inputs}
    for number, condition in enumerate(_on_inputs(model, conditions)):
        _guard(model.graph, inputs, condition, number)


def _on_inputs(model: ir.Model, conditions: Sequence[Condition]) -> list[Condition]:
    """The conditions on sizes of the model's inputs alone, without folders of this machine."""
    input_names = {str(value.name) for value in model.graph.inputs}
    result: list[Condition] = []
    for condition in conditions:
        if all(name in input_names for _, name, _ in condition.sizes):
            result.append(Condition.read(condition.stored()))  # what is stored names no folder
    return result


def conditions_of(metadata: Mapping[str, str], where: str) -> tuple[Condition, ...]:
    """The conditions that a file's metadata has; none where another program wrote the file."""
    text = metadata.get(RANGES)
    if text is None:
        return ()
    try:
        return tuple(Condition.read(row) for row in json_value(text, where))
    except (ValueError, TypeError, KeyError, LoraFxError) as e:
        raise LoraFxError(
            f"{where}: its metadata {RANGES} is damaged", "export the model again"
        ) from e


class _GuardNodes:
    """The nodes of one guard, in the order in which they are made."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def op(
        self,
        op_type: str,
        *operands: ir.Value | int,
        name: str = "",
        **attributes: int | ir.TensorProtocol,
    ) -> ir.Value:
        """Make a node of one output; operands that are numbers become constants."""
        inputs = [self.value(operand) for operand in operands]
        numbered = f"{self.prefix}_{len(self.nodes)}"
        node = ir.node(op_type, inputs, attributes, name=name or numbered)
        node.outputs[0].name = f"{numbered}_value"
        self.nodes.append(node)
        return node.outputs[0]

    def value(self, operand: ir.Value | int) -> ir.Value:
        """An operand, a number as a constant [1]."""
        if isinstance(operand, int):
            return self.op("Constant", value=ir.tensor([operand]))
        return operand

    def make(self, op: str, operands: Sequence[ir.Value | int]) -> ir.Value | int:
        """Make an operation of a condition; `Condition.build` calls this."""
        if op == "NotEq":
            return self.op("Not", self.op("Equal", *operands))
        if op == "FloorDiv":  # ONNX rounds towards zero
            dividend, divisor = map(self.value, operands)
            remainder = self.op("Mod", dividend, divisor)
            return self.op("Div", self.op("Sub", dividend, remainder), divisor)
        return self.op(_OPS[op], *operands)


def _guard(
    graph: ir.Graph, inputs: Mapping[str, ir.Value], condition: Condition, number: int
) -> None:
    """Put a guard behind the input whose size a condition names first."""
    guarded = inputs[condition.sizes[0][1]]
    uses = [(use.node, use.idx) for use in guarded.uses()]  # before the guard itself reads it
    guard = _GuardNodes(f"lora_fx_within_{number}")

    sizes: dict[str, ir.Value | int] = {}
    for symbol, name, axis in condition.sizes:
        sizes[symbol] = guard.op("Gather", guard.op("Shape", inputs[name]), axis)
    holds = condition.build(guard.make, sizes)
    assert isinstance(holds, ir.Value)
    broken = guard.op("Cast", guard.op("Not", holds), to=int(ir.DataType.INT64))

    # shape + (shape + 1) · broken: see the top of this module
    shape = guard.op("Shape", guarded)
    other_shape = guard.op("Mul", guard.op("Add", shape, 1), broken)
    target_shape = guard.op("Add", shape, other_shape)

    node_name = f"{GUARD}{condition} only"
    if any(node.name == node_name for node in graph):  # another condition comes to the same bound
        node_name = f"{node_name} ({number})"
    reshaped = guard.op("Reshape", guarded, target_shape, name=node_name)
    reshaped.type = guarded.type
    reshaped.shape = guarded.shape

    for node, index in uses:
        node.replace_input_with(index, reshaped)
    if guarded in graph.outputs:
        graph.outputs[graph.outputs.index(guarded)] = reshaped
    graph.insert_before(graph[0], guard.nodes)
