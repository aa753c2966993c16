"""The sizes that a file is true for: in its metadata, and as nodes that fail elsewhere.

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
from lora_fx.files.read import json_value

RANGES = "lora_fx.ranges"
GUARD = "lora_fx holds for "
_OPS = {
    "Add": "Add", "Sub": "Sub", "Mult": "Mul", "Mod": "Mod", "min": "Min", "max": "Max",
    "Lt": "Less", "LtE": "LessOrEqual", "Gt": "Greater", "GtE": "GreaterOrEqual", "Eq": "Equal",
    "Or": "Or", "And": "And",
}  # fmt: skip


def say_within(model: ir.Model, conditions: Sequence[Condition]) -> None:
    """Write conditions on a model's inputs into its metadata; a file of ours may have them."""
    own = _of_inputs(model, conditions)
    if own:
        model.metadata_props.setdefault(RANGES, json.dumps([c.stored() for c in own]))


def guard_within(model: ir.Model, conditions: Sequence[Condition]) -> None:
    """Put nodes in that fail where one of the conditions does not hold; once for a model."""
    inputs = {str(v.name): v for v in model.graph.inputs}
    if any(str(n.name).startswith(GUARD) for n in model.graph):
        return
    for i, condition in enumerate(_of_inputs(model, conditions)):
        _guard(model.graph, inputs[condition.sizes[0][1]], inputs, condition, i)


def _of_inputs(model: ir.Model, conditions: Sequence[Condition]) -> list[Condition]:
    """Those over the model's inputs, without folders of this machine."""
    names = {str(v.name) for v in model.graph.inputs}
    own = (c for c in conditions if all(n in names for _, n, _ in c.sizes))
    return [Condition.read(c.stored()) for c in own]


def conditions_of(metadata: Mapping[str, str], where: str) -> tuple[Condition, ...]:
    """What a file says of its sizes; nothing where another program wrote it."""
    text = metadata.get(RANGES)
    if text is None:
        return ()
    try:
        return tuple(Condition.read(row) for row in json_value(text, where))
    except (ValueError, TypeError, KeyError, LoraFxError) as e:
        raise LoraFxError(
            f"{where}: its metadata {RANGES} is damaged", "export the model again"
        ) from e


class _Nodes:
    """The nodes of one guard."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.nodes = prefix, list[ir.Node]()

    def op(
        self, kind: str, *xs: ir.Value | int, name: str = "", **given: int | ir.TensorProtocol
    ) -> ir.Value:
        values = [self.value(x) for x in xs]
        own = f"{self.prefix}_{len(self.nodes)}"
        node = ir.node(kind, values, given, name=name or own)
        node.outputs[0].name = f"{own}_value"
        self.nodes.append(node)
        return node.outputs[0]

    def value(self, x: ir.Value | int) -> ir.Value:
        return self.op("Constant", value=ir.tensor([x])) if isinstance(x, int) else x

    def make(self, op: str, xs: Sequence[ir.Value | int]) -> ir.Value | int:
        if op == "NotEq":
            return self.op("Not", self.op("Equal", *xs))
        if op == "FloorDiv":  # ONNX rounds towards zero
            x, by = map(self.value, xs)
            return self.op("Div", self.op("Sub", x, self.op("Mod", x, by)), by)
        return self.op(_OPS[op], *xs)


def _guard(
    graph: ir.Graph, x: ir.Value, inputs: Mapping[str, ir.Value], condition: Condition, i: int
) -> None:
    made = _Nodes(f"lora_fx_within_{i}")
    users = [(u.node, u.idx) for u in x.uses()]
    sizes: dict[str, ir.Value | int] = {
        n: made.op("Gather", made.op("Shape", inputs[name]), d) for n, name, d in condition.sizes
    }
    holds = condition.build(made.make, sizes)
    assert isinstance(holds, ir.Value)
    broken = made.op("Cast", made.op("Not", holds), to=int(ir.DataType.INT64))
    shape = made.op("Shape", x)
    other = made.op("Add", shape, made.op("Mul", made.op("Add", shape, 1), broken))
    name = f"{GUARD}{condition} only"
    if any(node.name == name for node in graph):  # another one comes to the same bound
        name = f"{name} ({i})"
    y = made.op("Reshape", x, other, name=name)
    y.type, y.shape = x.type, x.shape
    for node, index in users:
        node.replace_input_with(index, y)
    if x in graph.outputs:
        graph.outputs[graph.outputs.index(x)] = y
    graph.insert_before(graph[0], made.nodes)
