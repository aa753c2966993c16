"""Proofs try sizes that differ, hold a file to its own gate, and cry no wolf.

On 788628f Pooled was written, wrong by .14 at 3 × 5; Cast was refused for its own rounding on 11 of
80 seeds, four of floats and seven of integers; verify failed the int8 file that export had passed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.inputs import Input, Inputs


class Cast(nn.Module):
    """As a model of PEFT's own tests: a cast in forward, so there is no run in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.second(torch.relu(self.first(x.to(torch.float)))), -1)


@pytest.mark.parametrize(("seed", "dtype"), [(31, torch.float32), (3, torch.int64)])
def test_a_models_own_rounding_is_no_difference(
    seed: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    model, x = Cast().eval(), torch.arange(90).view(9, 10).to(dtype)
    module = lora_fx.insert(model, (x,), rank=8, include="*")
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.normal_()
    assert lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")


class Pooled(nn.Module):
    """torch's exporter writes adaptive pooling wrongly where height and width differ."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.conv(x), 2)
        result: Tensor = self.head(pooled.flatten(1))
        return result


class Strided(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.conv(x), size=(x.shape[2] * 2, x.shape[3] * 2))


FREE = {"x": {2: "height", 3: "width"}}


def test_sides_that_differ_are_tried(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(lora_fx.LoraFxError):
        lora_fx.export(Pooled().eval(), tmp_path / "p.onnx", (x,), dynamic=FREE, provider="cpu")
    assert not list(tmp_path.iterdir())
    report = lora_fx.export(
        Strided().eval(), tmp_path / "s.onnx", (x,), dynamic=FREE, provider="cpu"
    )
    sides = [p.sizes["x"][2:] for p in report.parity]
    assert any(h < w for h, w in sides)
    assert any(h > w for h, w in sides)


def test_symbols_have_sizes_of_their_own_near_the_example_where_it_is_large() -> None:
    dims = {0: "batch", 1: "a"}
    small = Inputs((Input("x", "float32", (2, 4), dims), Input("y", "float32", (2, 4), {1: "b"})))
    found = [small.sizes(size) for size in small.checks]
    assert any(f["x"][1] < f["y"][1] for f in found)
    assert any(f["x"][1] > f["y"][1] for f in found)
    large = Inputs((Input("x", "float32", (2, 3, 224, 224), {0: "batch", 2: "h", 3: "w"}),))
    assert {large.sizes(s)["x"][2:] for s in large.checks} == {(224, 336), (336, 224), (224, 224)}


def test_verify_holds_a_file_to_the_gate_of_its_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    cap = lora_fx.capture(model, (torch.randn(2, 32),))
    lora_fx.export(cap, tmp_path / "m.onnx", precision="int8", provider="cpu")
    assert lora_fx.verify(tmp_path / "m.onnx", cap)
    assert not lora_fx.verify(tmp_path / "m.onnx", cap, tol=1e-6)
    with torch.no_grad():
        model[0].weight.add_(torch.from_numpy(np.full((64, 32), 0.05, np.float32)))
    assert not lora_fx.verify(tmp_path / "m.onnx", lora_fx.capture(model, (torch.randn(2, 32),)))


def test_a_file_whose_names_are_sloppy_is_tried_with_equal_sizes_and_says_so(
    tmp_path: Path,
) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[b, s, 4] x, float[b, t, 4] m) => (float[b, s, 4] y) <float[4, 4] w = {
      1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 9}> { p = MatMul(x, w) y = Mul(p, m) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    report = lora_fx.verify(tmp_path / "m.onnx", tmp_path / "m.onnx")
    assert report
    assert any("tried only where s, t are equal" in w for w in report.warnings)
