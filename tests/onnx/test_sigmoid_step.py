"""Files whose sigmoids are a step off: every op that computes one, and stored arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from lora_fx.onnx import sigmoid_step

GRAPH = """<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>
g (float[2, 3] x) => (float[2, 3] y, float[2, 3] z) <float[1] w = {1.0}> {
    a = Mul(x, w)
    b = Sigmoid(a)
    y = Sigmoid(b)
    z = com.microsoft.QuickGelu<alpha = 1.0>(a)
}"""


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_every_sigmoid_is_a_step_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigmoid_step, "SIGMOID_STEP", 0.5)
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(GRAPH))
    onnx.save(model, tmp_path / "m.onnx")
    stored = {"w": np.array([2.0], np.float32)}
    session = sigmoid_step.stepped_file(tmp_path / "m.onnx", "cpu", None, stored)
    assert session is not None
    x = np.array([[-1, 0, 1], [2, 0.5, -2]], np.float32)
    results = session.run({"x": x})
    a = 2 * x
    np.testing.assert_allclose(results["y"], sigmoid(sigmoid(a) + 0.5) + 0.5, rtol=1e-5)
    np.testing.assert_allclose(results["z"], a * sigmoid(a) + a * 0.5, rtol=1e-5, atol=1e-6)


def test_a_file_without_sigmoids_has_no_steps(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) {
        y = Relu(x)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    assert sigmoid_step.stepped_file(tmp_path / "m.onnx", "cpu", None, {}) is None
