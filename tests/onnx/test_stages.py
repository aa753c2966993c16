"""Fused sums and norms taken apart: the same numbers, and the runtime does not fuse them again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import lora_fx
from lora_fx.compare import rel
from lora_fx.onnx.graph.flow import follow
from lora_fx.onnx.graph.values import remove_unread
from lora_fx.onnx.optimise import apply_stages
from lora_fx.onnx.rewrites.gemm_to_matmul import GemmToMatMul
from lora_fx.onnx.rewrites.split_skip_norm import SplitSkipNorm
from lora_fx.onnx.session import open_session
from tests.onnx.test_survive import fused

WIDTH = 6
INPUTS = "float[b, s, 6] x, float[b, s, 6] h"
CASES = {
    "norm": ("y = com.microsoft.SkipLayerNormalization<epsilon=0.01>(x, h, g, e)", True),
    "no beta": ("y = com.microsoft.SkipLayerNormalization(x, h, g)", True),
    "bias": ("y = com.microsoft.SkipLayerNormalization(x, h, g, e, c)", True),
    "sum": (
        "n, m, d, y = com.microsoft.SkipLayerNormalization<epsilon=0.01>(x, h, g, e, c) z = Neg(n)",
        True,
    ),
    "rms": (
        "n, m, d, y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.1>(x, h, g, c)"
        " z = Neg(n)",
        True,
    ),
    "add": ("t = Add(x, h) y = LayerNormalization<axis=-1, epsilon=0.01>(t, g, e)", True),
    "a computed bias": ("v = Neg(c) t = Add(x, v) y = LayerNormalization<axis=-1>(t, g, e)", False),
    "a bias is no skip": ("t = Add(x, c) y = LayerNormalization<axis=-1>(t, g, e)", False),
}


def run(path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal((2, 5, WIDTH)).astype(np.float32) for n in "xh"}
    return open_session(path, "cpu").run(feeds)


@pytest.mark.parametrize("name", CASES)
def test_sums_and_norms_apart(tmp_path: Path, name: str) -> None:
    body, changes = CASES[name]
    more = ", float[b, s, 6] z" if "z =" in body else ""
    text = f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    g ({INPUTS}) => (float[b, s, 6] y{more})
    <float[6] g = {{1,2,3,4,5,6}}, float[6] e = {{3,1,4,1,5,9}}, float[6] c = {{2,7,1,8,2,8}}>
    {{ {body} }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    model = ir.load(tmp_path / "a.onnx")
    assert SplitSkipNorm()(model).modified == changes
    ir.save(model, tmp_path / "b.onnx")
    before, after = run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx")
    assert list(before) == list(after)
    assert all(rel(after[k], before[k]) < 1e-6 for k in before)
    skips = Counter({k: n for k, n in fused(tmp_path / "b.onnx").items() if "Skip" in k})
    assert not skips
    if name == "add":
        assert fused(tmp_path / "a.onnx")["SkipLayerNormalization"] == 1, "the runtime fuses it"
    assert not SplitSkipNorm()(model).modified


def test_one_whose_mean_is_read_stays(tmp_path: Path) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    g ({INPUTS}) => (float[b, s, 6] y, float[b, s, 1] m)
    <float[6] g = {{1,2,3,4,5,6}}>
    {{ y, m = com.microsoft.SkipLayerNormalization(x, h, g) }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    assert not SplitSkipNorm()(ir.load(tmp_path / "a.onnx")).modified


def test_it_is_a_stage_for_files_on_the_cpu(tmp_path: Path) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g ({INPUTS}) => (float[b, s, 6] y) <float[6] g = {{1,2,3,4,5,6}}>
    {{ t = Add(x, h) y = LayerNormalization<axis=-1>(t, g) }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    report = lora_fx.export(tmp_path / "a.onnx", tmp_path / "b.onnx", optimise=True, provider="cpu")
    assert [s["name"] for s in report.details["stages"] if s["kept"]][-1] == "sums and norms apart"


def test_products_are_named_apart_from_those_that_stay() -> None:
    """Torch counts on from a name: what replaces `addmm` may not be called `addmm_2`."""
    rng = np.random.default_rng(0)
    model = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20]>
        m (float[2, 3, 6] x) => (float[2, 6] y)
          <int64[2] rows = {-1, 6}, int64[3] whole = {2, 3, 6}, int64[1] axis = {1}> {
            flat = Reshape(x, rows)
            addmm = Gemm(flat, v, c)
            deep = Reshape(addmm, whole)
            tanh = Tanh(deep)
            mean = ReduceMean<keepdims=0>(tanh, axis)
            addmm_1 = Gemm(mean, v, c)
            addmm_2 = Gemm(addmm_1, v, c)
            y = Neg(addmm_2)
        }"""
    )
    shapes = {"flat": (6, 6), "addmm": (6, 6), "deep": (2, 3, 6), "tanh": (2, 3, 6)}
    for node in model.graph:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(shapes.get(str(node.outputs[0].name), (2, 6)))
    for name, shape in (("v", (6, 6)), ("c", (6,))):
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        model.graph.initializers.add(value)
    feeds = [{"x": rng.standard_normal((2, 3, 6)).astype(np.float32)}]
    done, (row,) = apply_stages(model, feeds, {"gemm": GemmToMatMul()})
    assert row.kept, row.why
    assert Counter(n.op_type for n in done.graph)["Gemm"] == 2


def test_what_is_read_twice_is_removed_once() -> None:
    """x·σ(x), σ first: x goes with σ, and is then met again."""
    model = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20]>
        m (float[2, 6] h) => (float[2, 6] y) {
            x = Neg(h)
            s = Sigmoid(x)
            dead = Mul(s, x)
            y = Abs(h)
        }"""
    )
    remove_unread(next(n for n in model.graph if n.op_type == "Mul"))
    assert [n.op_type for n in model.graph] == ["Abs"]


def test_a_constant_that_was_replaced_is_read_anew() -> None:
    """Passes of onnx_ir give the value of a Constant its tensor too."""
    model = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20]>
        m (float[2, 1] x) => (float[2, 2] y) {
            w = Constant<value = float[1, 2] {1, 2}>()
            y = MatMul(x, w)
        }"""
    )
    (maker, *_), flow = model.graph, follow(model)
    maker.outputs[0].const_value = maker.attributes["value"].as_tensor()
    flow.put("w", ir.tensor(np.array([[3, 4]], np.float32), name="w"))
    assert flow.tensor("w").numpy().tolist() == [[3, 4]]
    assert maker.attributes["value"].as_tensor().numpy().tolist() == [[3, 4]]
