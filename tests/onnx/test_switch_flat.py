"""Branches on flat rows: the same numbers for every shape, flat only where all sizes are named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import lora_fx
from lora_fx.adapter.lowrank import LowRank
from lora_fx.compare import rel
from lora_fx.onnx import Session
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.passes.find import find
from lora_fx.passes.switch import Switch

W, BIAS = "float[4, 6] w", "float[6] c"
HEADS = "p = MatMul(x, w) q = Add(p, c) "
SIZES = "n = Shape<start=0, end=2>(x) to = Concat<axis=0>(n, tail) "
CASES = {  # inputs and outputs, body, Gemms
    "matrix": ("float[b, 4] x", "float[b, 6] y", "p = MatMul(x, w) y = Add(p, c)", 1),
    "rows": ("float[b, s, 4] x", "float[b, s, 6] y", "p = MatMul(x, w) y = Add(c, p)", 1),
    "bare": ("float[b, s, 4] x", "float[b, s, 6] y", "y = MatMul(x, w)", 1),
    "heads": ("float[b, s, 4] x", "float[b, s, 2, 3] y", f"{SIZES}{HEADS}y = Reshape(q, to)", 2),
    "heads that copy sizes": (
        "float[b, s, 4] x", "float[b, s, 2, 3] y", f"{HEADS}y = Reshape(q, zeros)", 1
    ),
    "heads read twice": (
        "float[b, s, 4] x", "float[b, s, 2, 3] y",
        f"{SIZES}{HEADS}r = Reshape(q, to) g = Tanh(q) h = Reshape(g, to) y = Add(r, h)", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sums_inside_products(tmp_path: Path, name: str) -> None:
    x, y, body, gemms = CASES[name]
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g ({x}) => ({y}) <{W}, {BIAS}, int64[2] tail = {{-1, 3}}, int64[4] zeros = {{0, 0, 2, 3}}>
    {{ {body} }}"""
    text = text.replace(W, f"{W} = {{{', '.join(str(i % 7 - 3) for i in range(24))}}}")
    text = text.replace(BIAS, f"{BIAS} = {{3, 1, 4, 1, 5, 9}}")
    onnx.save(onnx.parser.parse_model(text), tmp_path / "base.onnx")
    graph = OnnxGraph(ir.load(tmp_path / "base.onnx"))
    layout = find(graph)["w"].layout
    Switch(["w"])(graph)
    ir.save(graph.model, tmp_path / "s.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "s.onnx"), full_check=True)
    assert Counter(n.op_type for n in graph.model.graph)["Gemm"] == gemms
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4), (6, 2)))
    session = Session(tmp_path / "s.onnx", provider="cpu")
    session.load("one", lora_fx.Adapter({"w": LowRank(a, b, 3.0, layout)}))
    w = (np.arange(24) % 7 - 3.0).reshape(4, 6)
    for size in ((2, 5), (3, 1), (1, 4)):
        data = rng.standard_normal((*size[: 2 if "s," in x else 1], 4)).astype(np.float32)
        for choice, change in ((None, 0.0), ("one", 1.5 * (b @ a).T.astype(np.float64))):
            want = data @ (w + change) + (0 if name == "bare" else [3, 1, 4, 1, 5, 9])
            if "heads" in name:
                want = want.reshape(*size, 2, 3)
            want = want + np.tanh(want) if name == "heads read twice" else want
            got = session.run({"x": data}, adapter=choice)["y"]
            assert got.shape == want.shape and rel(got, want) < 1e-5, (size, choice)
