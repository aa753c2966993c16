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
from lora_fx.onnx.session import open_session
from lora_fx.onnx.stages import SplitSkipNorm
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
