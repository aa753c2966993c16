"""The ops that only view a weight: the steps of each, and the array that they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lora_fx.ir.view import Cast, Gather, Permute, Reshape, Slice, Step
from lora_fx.onnx.graph.views import VIEWS, after

UNKNOWN = "an operand that a run computes"
CASES: list[tuple[str, tuple[int, ...], Mapping[str, Any], list[Any], list[Step] | None]] = [
    ("Identity", (2, 3), {}, [], []),
    ("Transpose", (2, 3, 4), {}, [], [Permute((2, 1, 0))]),
    ("Transpose", (2, 3, 4), {"perm": [0, 2, 1]}, [], [Permute((0, 2, 1))]),
    ("Cast", (2, 3), {"to": int(ir.DataType.FLOAT)}, [], []),
    ("Cast", (2, 3), {"to": int(ir.DataType.FLOAT16)}, [], [Cast("float16")]),
    ("Cast", (2, 3), {"to": int(ir.DataType.INT64)}, [], None),
    ("Reshape", (2, 3, 4), {}, [[0, -1]], [Reshape((2, 12))]),
    ("Reshape", (2, 3, 4), {"allowzero": 1}, [[0, -1]], None),
    ("Reshape", (2, 3, 4), {}, [UNKNOWN], None),
    ("Squeeze", (2, 1, 4, 1), {}, [], [Reshape((2, 4))]),
    ("Squeeze", (2, 1, 4, 1), {}, [[-1]], [Reshape((2, 1, 4))]),
    ("Squeeze", (2, 1, 4, 1), {"axes": [1]}, [], [Reshape((2, 4, 1))]),
    ("Squeeze", (2, 1, 4, 1), {}, [UNKNOWN], None),
    ("Unsqueeze", (2, 3), {}, [[0, -1]], [Reshape((1, 2, 3, 1))]),
    ("Unsqueeze", (2, 3), {}, [UNKNOWN], None),
    ("Flatten", (2, 3, 4), {}, [], [Reshape((2, 12))]),
    ("Flatten", (2, 3, 4), {"axis": 2}, [], [Reshape((6, 4))]),
    ("Expand", (2, 3), {}, [[1, 2, 3]], [Reshape((1, 2, 3))]),
    ("Expand", (2, 3), {}, [[4, 2, 3]], None),
    ("Expand", (2, 3), {}, [UNKNOWN], None),
    ("Slice", (5, 6), {}, [[1], [1 << 62], [0]], [Slice(0, 1, 5)]),
    ("Slice", (5, 6), {}, [[0, -2], [2, 6]], [Slice(0, 0, 2), Slice(1, 4, 6)]),
    ("Slice", (5, 6), {}, [[0], [4], [0], [2]], None),
    ("Slice", (5, 6), {}, [[0], [4], UNKNOWN], None),
    ("Slice", (5, 6), {}, [UNKNOWN, [4]], None),
    ("Split", (5, 6), {}, [], [Slice(0, 0, 3)]),
    ("Split", (5, 6), {"axis": -1}, [[2, 4]], [Slice(1, 0, 2)]),
    ("Split", (5, 6), {}, [UNKNOWN], None),
    ("Gather", (5, 6), {}, [3], [Slice(0, 3, 4), Reshape((6,))]),
    ("Gather", (5, 6), {"axis": 1}, [-1], [Slice(1, 5, 6), Reshape((5,))]),
    ("Gather", (5, 6), {}, [[3, 4]], None),
    ("Gather", (5, 6, 7), {}, [UNKNOWN], [Gather(0)]),
    ("Gather", (5, 6, 7), {"axis": 1}, [UNKNOWN], None),
    ("Gather", (5, 6), {}, [UNKNOWN], None),
    ("GatherND", (5, 6, 7), {"batch_dims": 1}, [UNKNOWN], None),
    ("GatherND", (5, 6, 7), {}, [UNKNOWN], None),
]  # fmt: skip


def _value(i: int, operand: Any) -> ir.Value:
    if operand == UNKNOWN:
        return ir.Value(name=f"computed_{i}", shape=ir.Shape(["n"]))
    return ir.val(f"stored_{i}", const_value=ir.tensor(np.array(operand, np.int64)))


@pytest.mark.parametrize(
    ("op", "shape", "attributes", "operands", "steps"),
    CASES,
    ids=[f"{case[0]}_{i}" for i, case in enumerate(CASES)],
)
def test_the_steps_of_a_view(
    op: str,
    shape: tuple[int, ...],
    attributes: Mapping[str, Any],
    operands: list[Any],
    steps: list[Step] | None,
) -> None:
    weight = ir.Value(name="w", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    inputs = [weight, *(_value(i, operand) for i, operand in enumerate(operands))]
    node = ir.node(op, inputs, attributes, num_outputs=2 if op == "Split" else 1)
    assert VIEWS[op](node, shape, 0) == steps


def test_parts_of_a_split_and_the_shape_after_steps() -> None:
    weight = ir.Value(name="w", shape=ir.Shape((5, 6)))
    node = ir.node("Split", [weight], num_outputs=2)
    steps = VIEWS["Split"](node, (5, 6), 1)
    assert steps == [Slice(0, 3, 5)], "the last part may be shorter"
    assert after((5, 6), [*steps, Permute((1, 0)), Reshape((3, 4))]) == (3, 4)
    assert after((5, 6), [*steps, Permute((1, 0))]) == (6, 2)
