"""Draws nodes and graphs whose rows lora_fx.onnx.row_axis follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.ops import MS
from lora_fx.onnx.row_axis import SAME, RowAxis

BATCH = "batch"
SIZES = (BATCH, BATCH, BATCH, "length", "3*batch", "batch*length", 1, 1, 2, 3, 4, 6, 12, None)
FAMILIES = [
    "Reshape",
    *["Transpose", "Gather", "GatherND", "MatMul", "Einsum"] * 2,
    "Add Clip Identity Mul Where",
    "ReduceMax ReduceMean ArgMax ArgMin Squeeze",
    "Conv MaxPool BatchNormalization ConvInteger QAttention",
    "Softmax Hardmax TopK Split MatMulNBits MatMulInteger",
    "LayerNormalization RMSNormalization",
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear",
    "Concat GatherElements ScatterElements",
    "GRU LSTM RNN DynamicQuantizeLSTM",
    "SequenceAt SequenceConstruct SequenceErase SequenceInsert",
    "SplitToSequence ConcatFromSequence",
    "Slice CumSum",
    "Flatten Gemm",
    *["Expand", "GatherBlockQuantized", "Pad", "ReverseSequence", "Tile", "Unsqueeze"],
    "NonZero Shape SequenceEmpty",
]
"""Ops that have one rule in common; every family is drawn as often as the others."""

Size = str | int | None
Numbers = list[int]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "ArgMax": ("axis", "keepdims"),
    "ArgMin": ("axis", "keepdims"),
    "ConcatFromSequence": ("axis!", "new_axis"),
    "Einsum": ("equation!",),
    "Gemm": ("transA",),
    "GatherND": ("batch_dims",),
    "Reshape": ("allowzero",),
    "ReverseSequence": ("batch_axis", "time_axis"),
    "SplitToSequence": ("axis", "keepdims"),
    "Transpose": ("perm",),
}
"""Attributes of ops by name; one with a "!" is never left out."""
NUMBERS: dict[str, dict[int, str]] = {
    "CumSum": {1: "axis"},
    "Pad": {1: "pads", 3: "axes"},
    "Reshape": {1: "shape"},
    "Slice": {3: "axes"},
    "SplitToSequence": {1: "split"},
    "Squeeze": {1: "axes"},
    "Tile": {1: "repeats"},
    "Unsqueeze": {1: "axes"},
}
"""Operands of ops that hold whole numbers, by their slots."""
BY_AXIS = {
    *("Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "RMSNormalization", "TopK"),
    *("Concat", "Split", "Flatten", "GatherElements", "ScatterElements"),
    *("Gather", "GatherBlockQuantized", "MatMulNBits", "MatMulInteger"),
}
RECURRENT = ("GRU", "LSTM", "RNN", "DynamicQuantizeLSTM")


def node(rng: Random) -> tuple[ir.Node, dict[ir.Value, RowAxis], int, str]:
    """A node, the rows of what it reads, the number of one of its results, and the symbol."""
    return _node_of(rng, rng.choice(rng.choice(FAMILIES).split()))


def reshape(rng: Random) -> tuple[ir.Node, dict[ir.Value, RowAxis], int, str]:
    """A Reshape, and so on as in `node`."""
    return _node_of(rng, "Reshape")


def _node_of(rng: Random, op: str) -> tuple[ir.Node, dict[ir.Value, RowAxis], int, str]:
    pool = [_value(rng, f"x{i}") for i in range(4)]
    drawn = _node(rng, pool, op)
    states = {value: _rows(rng, value) for value in drawn.inputs if value is not None}
    if rng.random() < 0.6:  # one operand alone has rows
        states = dict([rng.choice(sorted(states.items(), key=lambda pair: str(pair[0].name)))])
    return drawn, states, rng.randrange(len(drawn.outputs)), BATCH


def graph(rng: Random) -> tuple[ir.Model, str, set[ir.Value], set[ir.Value] | None]:
    """A graph of a few nodes, the symbol, and which values branches read and change."""
    inputs = [_value(rng, f"x{i}", first=BATCH) for i in range(2)] + [_value(rng, "x2")]
    pool = list(inputs)
    nodes = []
    for _ in range(rng.randint(2, 6)):
        drawn = _node(rng, pool, rng.choice(rng.choice(FAMILIES).split()))
        nodes.append(drawn)
        pool += drawn.outputs
    nodes += [_if(pool[-1])] * (rng.random() < 0.1)
    model = ir.Model(ir.Graph(inputs, [pool[-1]], nodes=nodes), ir_version=10)
    read = set(rng.sample(pool, 2))
    changed = set(rng.sample(pool, 2)) if rng.random() < 0.5 else None
    return model, BATCH, read, changed


def _if(value: ir.Value) -> ir.Node:
    """A node whose body reads a value."""
    reader = ir.node("Identity", [value])
    body = ir.Graph([], reader.outputs, nodes=[reader])
    return ir.node("If", [], attributes={"then_branch": body})


def _value(rng: Random, name: str, first: Size = None, rank: int | None = None) -> ir.Value:
    if rank is None:
        rank = rng.choice((0, 1, 2, 2, 3, 3, 3, 4))
    shape = None if rng.random() < 0.06 else [rng.choice(SIZES) for _ in range(rank)]
    if first is not None and rng.random() < 0.9:
        shape = [first, *(shape or ())]
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape))


def _rows(rng: Random, value: ir.Value) -> RowAxis:
    """Where a value has its rows; on most values that has to do with its sizes."""
    sizes = [str(size) for size in value.shape or ()]
    if not sizes or rng.random() < 0.25:
        return SAME if rng.random() < 0.9 else RowAxis(0)
    axes = [axis for axis, size in enumerate(sizes) if BATCH in size]
    axis = rng.choice(axes) if axes and rng.random() < 0.85 else rng.randrange(len(sizes))
    if sizes[axis] == BATCH and rng.random() < 0.9:
        return RowAxis(axis)
    exact, inner = rng.choice([(True, False), (False, False), (False, True)])
    return RowAxis(axis, exact, inner=inner)


def _node(rng: Random, pool: Sequence[ir.Value], op: str) -> ir.Node:
    data = rng.choice(pool)
    rank = len(data.shape) if data.shape is not None else rng.randint(1, 4)
    inputs: list[ir.Value | None] = [data]
    inputs += [rng.choice(pool) for _ in range(rng.randint(0, 2))]
    if op in ("MatMul", "Gather", "GatherND", "GatherBlockQuantized", "Expand", "ReverseSequence"):
        inputs = [data, *inputs[1:2]] if len(inputs) > 1 else [data, rng.choice(pool)]
    if op in RECURRENT:
        inputs[:1] = [_value(rng, "sequence", rank=3)]
        inputs += [rng.choice((*pool, None)) for _ in range(5)]
    for slot, name in _numbers_of(op).items():
        inputs = inputs[:slot] + [None] * (slot - len(inputs))
        chance = rng.random() - 0.5 * (name == "split")
        if 0 < chance < 0.9:
            tensor = ir.tensor(np.array(_numbers(rng, name, rank), np.int64))
            inputs.append(ir.Value(name=f"numbers {slot}", const_value=tensor))
        elif 0 < chance < 0.95:
            inputs.append(rng.choice(pool))
    attributes = {}
    for name in _attributes_of(op):
        if name.endswith("!") or rng.random() < 0.6:
            plain = name.rstrip("!")
            attributes[plain] = _attribute(rng, plain, inputs, rank)
    domain = MS if op in ("QAttention", "MatMulNBits", "DynamicQuantizeLSTM") else ""
    domain = "other" if rng.random() < 0.01 else domain
    outputs = [_result(rng, op, data, f"{data.name} {i}") for i in range(rng.randint(1, 2))]
    return ir.node(op, inputs, attributes=attributes, domain=domain, outputs=outputs)


def _attributes_of(op: str) -> tuple[str, ...]:
    if op in BY_AXIS:
        return ("axis",)
    if op in RECURRENT:
        return ("layout",)
    if op.startswith("Reduce"):
        return ("keepdims",)
    return ATTRIBUTES.get(op, ())


def _numbers_of(op: str) -> dict[int, str]:
    return {1: "axes"} if op.startswith("Reduce") else NUMBERS.get(op, {})


def _numbers(rng: Random, name: str, rank: int) -> Numbers | int:
    draws: dict[str, Callable[[], Numbers | int]] = {
        "axis": lambda: _axis(rng, rank),
        "axes": lambda: [_axis(rng, rank) for _ in range(rng.randint(1, 2))],
        "pads": lambda: [rng.choice((0, 0, 0, 1)) for _ in range(2 * rank)],
        "repeats": lambda: [rng.choice((1, 1, 2)) for _ in range(rank)],
        "shape": lambda: [rng.choice((0, -1, 1, 2, 6)) for _ in range(rng.randint(1, 4))],
        "split": lambda: [1, 2],
    }
    return draws[name]()


def _axis(rng: Random, rank: int) -> int:
    return rng.randrange(-rank, rank) if rank else rng.choice((0, -1))


def _attribute(rng: Random, name: str, inputs: Sequence[ir.Value | None], rank: int) -> Any:
    if name == "axis":
        return _axis(rng, rank)
    if name == "perm":
        return rng.sample(range(rank), rank) or [0]
    if name == "equation":
        return _equation(rng, inputs)
    if name in ("batch_axis", "time_axis"):
        return rng.randrange(2)
    return int(rng.random() < 0.5)


def _equation(rng: Random, inputs: Sequence[ir.Value | None]) -> str:
    terms = []
    for value in inputs:
        rank = len(value.shape) if value is not None and value.shape is not None else 4
        terms.append("".join(rng.sample("abcdefghijkl"[: max(rank, 4)], rank)))
    letters = sorted(set("".join(terms)))
    result = "".join(rng.sample(letters, rng.randint(0, len(letters))))
    arrow = rng.choice(("->", "->", "->", " -> ", ""))
    return f"{', '.join(terms)}{arrow}{result}" if rng.random() < 0.95 else "...->..."


def _result(rng: Random, op: str, data: ir.Value, name: str) -> ir.Value:
    """A result; of a Reshape, sizes that hold as many elements as those of the data."""
    if op not in ("Reshape", "Flatten", "GatherND") or data.shape is None or rng.random() < 0.1:
        return _value(rng, name)
    sizes = [str(size) for size in data.shape]
    for _ in range(rng.randint(1, 3)):
        _regroup(rng, sizes)
    texts = {"None": None}
    return ir.Value(
        name=name,
        shape=ir.Shape([int(s) if s.isdecimal() else texts.get(s, s) for s in sizes]),
    )


def _regroup(rng: Random, sizes: list[str]) -> None:
    """Join two sizes, part one, put a size of 1 between them, or take one away."""
    step = rng.choice(("join", "part", "one", "drop"))
    at = rng.randrange(len(sizes)) if sizes else 0
    if step == "one" or not sizes:
        sizes.insert(at, "1")
    elif step == "drop" and sizes[at] == "1":
        del sizes[at]
    elif step == "join" and at + 1 < len(sizes):
        pair = sizes[at : at + 2]
        if all(size.isdecimal() for size in pair):
            product = str(int(pair[0]) * int(pair[1]))
        else:
            product = "*".join(size for size in sorted(pair) if size != "1")
        sizes[at : at + 2] = ["None" if "None" in pair else product]
    elif step == "part":
        factors = {"12": ["3", "4"], "6": ["2", "3"], "4": ["2", "2"]}
        whole = sizes[at]
        sizes[at : at + 1] = factors.get(whole, whole.split("*"))
