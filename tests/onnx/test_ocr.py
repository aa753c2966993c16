"""A recogniser of text from another framework (PaddlePaddle, opset 11): no torch source exists."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from PIL import Image, ImageDraw, ImageFont

import lora_fx
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.compare import rel
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert

LINE = "lora-fx reads 2026"
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def path() -> Path:
    return Path(
        str(distribution("rapidocr").locate_file("rapidocr/models/PP-OCRv6_rec_small.onnx"))
    )


def drawn(text: str) -> Array:
    """A line of text as the recogniser takes it: [1, 3, 48, width], BGR in [-1, 1]."""
    image = Image.new("RGB", (480, 48), "white")
    font = ImageFont.load_default(40)
    ImageDraw.Draw(image).text((6, 0), text, fill="black", font=font)
    pixels = np.asarray(image).astype(np.float32)[..., ::-1] / 255
    return np.ascontiguousarray(((pixels - 0.5) / 0.5).transpose(2, 0, 1)[None])


LEVELS = ort.GraphOptimizationLevel
OTHERS = (LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_BASIC, LEVELS.ORT_ENABLE_EXTENDED)


def run(model: ir.Model, x: Array, level: Any = LEVELS.ORT_ENABLE_ALL) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = level
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def read(model: ir.Model, y: Array) -> str:
    """The best path, repeats joined, blanks (class 0) left out."""
    letters = ["", *model.metadata_props["character"].splitlines(), " "]
    best = y[0].argmax(-1)
    kept = (c for i, c in enumerate(best) if c and (i == 0 or c != best[i - 1]))
    return "".join(letters[c] for c in kept)


def updates(model: ir.Model, size: float) -> dict[str, LowRank]:
    result = {}
    for t in find(OnnxGraph(model)).targets:
        a, b = draw(t.key, t.layout, 4, 0, "probe")
        result[t.key] = LowRank(a, b * size, 4.0, t.layout)
    return result


def test_targets(path: Path) -> None:
    found = find(OnnxGraph(ir.load(path)))
    assert found.reached_share > 0.98
    assert all("depthwise" in r.reason for r in found.refusals)
    assert {t.op for t in found.targets} == {"conv2d", "matmul"}


def test_a_zero_adapter_reads_the_line(path: Path) -> None:
    x, model = drawn(LINE), ir.load(path)
    before = run(model, x)
    assert read(model, before) == LINE
    assert Insert(updates(model, 0.0))(OnnxGraph(model)).modified
    after = run(model, x)
    assert read(model, after) == LINE
    assert rel(after, before) < 1e-5


def test_insert_equals_fold(path: Path) -> None:
    """Up to the model's own rounding: how far the runtime's rewrites move one and the same file."""
    x, base = drawn(LINE), ir.load(path)
    models = []
    for make in (Insert, Fold):
        models.append(ir.load(path))
        assert make(updates(models[-1], 0.003))(OnnxGraph(models[-1])).modified
    inserted, folded = (run(m, x) for m in models)
    assert rel(folded, run(base, x)) > 0.01
    own = max(rel(folded, run(models[1], x, level)) for level in OTHERS)
    assert rel(inserted, folded) < 2 * own + 1e-6
    assert own < 1e-5


@pytest.mark.parametrize("mode", ["switch", "load"])
def test_it_takes_slots_for_adapters(mode: str, path: Path, tmp_path: Path) -> None:
    """Proven on images of a size that the strides leave something of."""
    report = lora_fx.export(path, tmp_path / "m.onnx", mode=mode, provider="cpu")
    assert report and report.details["targets"] > 50
    assert {p.sizes["x"] for p in report.parity} == {(n, 3, 48, 64) for n in (1, 2, 3)}
    feeds = {"x": drawn(LINE)}
    (y,) = open_session(tmp_path / "m.onnx", "cpu").run(feeds).values()
    assert read(ir.load(path), y) == LINE
