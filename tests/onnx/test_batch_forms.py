"""Batch mode of uses that few models have: a weight on the left, and names that are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, LoraFxError
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import rel
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find

W = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)


def left(folder: Path, name: str = "x") -> Path:
    """A file y = W @ x, x [batch, 6, n]."""
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    g (float[batch, 6, n] {name}) => (float[batch, 5, n] y) <float[5, 6] w> {{
        y = MatMul(w, {name})
    }}"""
    model = onnx.parser.parse_model(text)
    del model.graph.initializer[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(W, "w"))
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def adapters(path: Path) -> list[Adapter]:
    """Two adapters of the file's one weight, of different ranks."""
    (target,) = find(OnnxGraph(load(path))).targets
    result = []
    for seed, rank in ((1, 2), (2, 3)):
        a, b = draw(target.key, target.layout, rank, seed, "probe")
        result.append(Adapter({target.key: lora_fx.LowRank(a, b, 2.0, target.layout)}))
    return result


def test_a_weight_on_the_left(tmp_path: Path) -> None:
    path = left(tmp_path)
    one, two = adapters(path)
    out = tmp_path / "b.onnx"
    lora_fx.export(path, out, adapters=[one, two], mode="batch", provider="cpu")
    x = np.random.default_rng(1).standard_normal((3, 6, 4)).astype(np.float32)
    feeds: dict[str, Any] = {"x": x, "adapter_ids": np.array([2, 0, 1])}
    y = open_session(out, "cpu").run(feeds)["y"]
    for row, adapter in enumerate((two, None, one)):
        weight = W.astype(float)
        if adapter is not None:
            weight = weight + adapter.deltas()["w"]
        assert rel(y[row], weight @ x[row]) < 1e-6


def test_an_input_that_has_the_name_of_ours(tmp_path: Path) -> None:
    path = left(tmp_path, "adapter_ids")
    with pytest.raises(LoraFxError, match="the model has an input 'adapter_ids' already"):
        lora_fx.export(path, tmp_path / "b.onnx", adapters=adapters(path), mode="batch")


class Attention(nn.Module):
    """Attention whose rows are innermost, [length · batch, in], before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1)
        return self.attention(x, x, x, need_weights=False)[0].transpose(0, 1)


def test_rows_that_are_innermost_in_float16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora_fx.capture(Attention().half().eval(), (torch.randn(3, 5, 8).half(),))
    lows = {}
    for target in lora_fx.find(model).targets:
        a, b = draw(target.key, target.layout, 2, 1, "probe")
        lows[target.key] = lora_fx.LowRank(a, b, 2.0, target.layout)
    assert "attention.out_proj.weight" in lows
    out = tmp_path / "b.onnx"
    assert lora_fx.export(model, out, adapters=[Adapter(lows)], mode="batch", provider="cpu")
