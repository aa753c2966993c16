"""The nodes that lora_fx lists as obstacles on CUDA, in graphs of a few nodes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

import lora_fx
from lora_fx.onnx.cuda_obstacles import cuda_obstacles
from lora_fx.onnx.graph_runs import refuse_uncapturable
from tests.cuda import stand_in
from tests.cuda.table import PLACED

GRAPHS = {
    "a product": ("float[n, 3] x", "float[n, 3] y", "y = Add(x, x)", []),
    "a size as a size": (
        "float[n, 3] x", "float[n, 3] y",
        "shape = Shape(x)  flat = Flatten(x)  y = Reshape(flat, shape)", [],
    ),
    "sizes of sizes": (
        "float[n, 3] x", "float[m, 3] y",
        "shape = Shape(x)  twice = Add(shape, shape)  y = Expand(x, shape)", [],
    ),
    "a size as a number": (
        "int64[n, 3] x", "int64[n, 3] y",
        "rows = Shape<start = 0, end = 1>(x)  y = Add(x, rows)", ["Add"],
    ),
    "rows of a range": (
        "float[n, 3] x", "int64[n] y",
        "rows = Shape<start = 0, end = 1>(x)  axes = Constant<value_ints = [0]>()"
        "  zero = Constant<value_int = 0>()  one = Constant<value_int = 1>()"
        "  n = Squeeze(rows, axes)  y = Range(zero, n, one)", [],
    ),
    "a number as a size": (
        "int64[1] x, float[3] z", "float[n] y", "d = Mul(x, x)  y = Expand(z, d)", ["Expand"],
    ),
    "a fed size": ("int64[1] x, float[3] z", "float[n] y", "y = Expand(z, x)", []),
    "no kernel": (
        "int64[n] x", "int64[m] y", "d = Mul(x, x)  u = Unique(d)  y = Mul(u, u)", ["Unique"],
    ),
    "no kernel for bits": (
        "int64[n] x", "int64[n] y", "d = Mul(x, x)  b = BitwiseAnd(d, d)  y = Mul(b, b)",
        ["BitwiseAnd"],
    ),
    "no kernel for a function of angles": (
        "float[n] x", "float[n] y", "d = Neg(x)  s = Sinh(d)  c = Acosh(s)  y = Neg(c)",
        ["Sinh", "Acosh"],
    ),
    "no kernel for this dtype": (
        "int64[n, 3] x", "int64[n, 1] y",
        "d = Neg(x)  p = ArgMax<axis = 1>(d)  axes = Constant<value_ints = [1]>()"
        "  q = ReduceProd(d, axes)  y = Add(p, q)", ["ArgMax", "ReduceProd"],
    ),
    "kernels for this dtype": (
        "float[n, 3] x", "int64[n, 1] y",
        "d = Neg(x)  p = ArgMax<axis = 1>(d)  axes = Constant<value_ints = [1]>()"
        "  q = ReduceProd(d, axes)  r = Cast<to = 7>(q)  y = Add(p, r)", [],
    ),
    "no kernel for these attributes": (
        "float[n, 3] x", "int64[n, 1] y",
        "d = Neg(x)  p = ArgMax<axis = 1, select_last_index = 1>(d)  y = Neg(p)", ["ArgMax"],
    ),
    "weights in int8": (
        "float[n, 3] x", "float[n, 2] y",
        "d = Neg(x)  q, s, z = DynamicQuantizeLinear(d)"
        "  w = Constant<value = int8[3, 2] {1, 2, 3, 4, 5, 6}>()"
        "  p = MatMulInteger(q, w, z)  f = Cast<to = 1>(p)  y = Mul(f, s)",
        ["DynamicQuantizeLinear", "MatMulInteger"],
    ),
    "without a kernel, of constants": (
        "float[n, 3] x", "float[n, 3] y",
        "c = Constant<value_floats = [1.0, 2.0, 3.0]>()  a = Celu(c)  b = Neg(a)"
        "  y = Mul(x, b)", [],
    ),
    "without a kernel, of sizes": (
        "float[n, 3] x", "float[n, 3] y",
        "s = Shape(x)  b = BitwiseAnd(s, s)  d = Neg(x)  e = Expand(d, b)  y = Neg(e)", [],
    ),
    "axes that depend on data": (
        "float[n, 3] x, int64[1] i", "float[m, 3] y",
        "d = Neg(i)  e = Neg(x)  r = ReduceL1(e, d)  y = Neg(r)", ["ReduceL1"],
    ),
    "a pad of floats": (
        "float[n, 3] x", "float[m, 4] y",
        "pads = Constant<value_ints = [0, 0, 0, 1]>()  y = Pad(x, pads)", [],
    ),
    "a pad of integers": (
        "int64[n, 3] x", "int64[m, 4] y",
        "pads = Constant<value_ints = [0, 0, 0, 1]>()"
        "  d = Mul(x, x)  p = Pad(d, pads)  y = Mul(p, p)", ["Pad"],
    ),
    "control flow": (
        "bool c, float[n, 3] x", "float[n, 3] y",
        "d = Not(c)  y = If(d) <then_branch = a () => (float[n, 3] u) { u = Add(x, x) },"
        " else_branch = b () => (float[n, 3] v) { v = Mul(x, x) }>", ["If"],
    ),
}  # fmt: skip
"""Inputs, outputs, nodes, and the operators that are obstacles.

These stand between nodes of the device: an input that only the CPU reads is fed to it uncopied."""


def model_of(graph: str) -> onnx.ModelProto:
    inputs, outputs, nodes, _ = GRAPHS[graph]
    return parsed(inputs, outputs, nodes)


def parsed(inputs: str, outputs: str, nodes: str) -> onnx.ModelProto:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {nodes} }}'
    return onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))


COUNTING = {
    "positions": (
        "float[n, 3] x", "int64[2, m] y", "d = Neg(x)  p = NonZero(d)  y = Neg(p)", "NonZero",
    ),
    "chosen rows": (
        "float[n, 3] x, bool[n] c", "float[m, 3] y",
        "d = Neg(x)  b = Not(c)  r = Compress<axis = 0>(d, b)  y = Neg(r)", "Compress",
    ),
    "boxes": (
        "float[1, n, 4] x, float[1, 2, n] c", "int64[m, 3] y",
        "d = Neg(x)  s = Neg(c)  b = NonMaxSuppression(d, s)  y = Neg(b)", "NonMaxSuppression",
    ),
}  # fmt: skip
"""Inputs, outputs, nodes, and the operator whose kernel counts its results on the device.

The provider accepts a session that captures these, and fails in its second run."""


@pytest.mark.parametrize("graph", COUNTING)
def test_what_counts_its_results_is_never_captured(graph: str, tmp_path: Path) -> None:
    inputs, outputs, nodes, operator = COUNTING[graph]
    model = parsed(inputs, outputs, nodes)
    (obstacle,) = cuda_obstacles(ir.from_proto(model))
    assert obstacle.op == operator
    assert obstacle.reason == (
        "has a shape that depends on data, and is copied to the host in every run"
    )
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    with pytest.raises(lora_fx.LoraFxError, match=f"no CUDA graph can be captured: {operator}"):
        refuse_uncapturable(path)


@pytest.mark.parametrize("graph", GRAPHS)
def test_obstacles_of_a_graph(graph: str) -> None:
    obstacles = cuda_obstacles(ir.from_proto(model_of(graph)))
    assert [obstacle.op for obstacle in obstacles] == GRAPHS[graph][3]


def test_the_provider_copies_at_the_obstacles_and_nowhere_else(
    stand_in_folder: Path, tmp_path: Path
) -> None:
    copying = {}
    for graph in GRAPHS:
        path = tmp_path / f"{graph}.onnx"
        onnx.save(model_of(graph), path)
        child = stand_in.run_with(stand_in_folder, PLACED, path)
        placement = json.loads(child.stdout)
        assert "refused" not in placement, placement
        copying[graph] = bool(placement["copies"])
    assert copying == {graph: bool(operators) for graph, (*_, operators) in GRAPHS.items()}


def test_an_export_names_them(tmp_path: Path) -> None:
    model = lora_fx.capture(torch.nn.Sequential(torch.nn.Linear(4, 3)), (torch.randn(5, 4),))
    merged = lora_fx.export(model, tmp_path / "m.onnx", provider="cpu")
    assert merged.details["cuda"] == {"capturable": True, "obstacles": []}

    adapter = lora_fx.insert(model, rank=2).adapter()
    path = tmp_path / "b.onnx"
    batch = lora_fx.export(model, path, provider="cpu", mode="batch", adapters={"a": adapter})
    obstacles = cuda_obstacles(ir.load(path))
    assert [obstacle.op for obstacle in obstacles] == ["Unique"]
    assert batch.details["cuda"] == {
        "capturable": False,
        "obstacles": [asdict(obstacle) for obstacle in obstacles],
    }
