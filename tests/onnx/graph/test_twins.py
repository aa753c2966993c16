"""Twins that must not change: what looks like the case of a rewrite, and is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.adapter.origin import Origin
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.fx import to_onnx
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.rewrites.delta_before_bias import DeltaBeforeBias
from lora_fx.onnx.rewrites.gemm_to_matmul import GemmToMatMul
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold


def model_of(inputs: str, outputs: str, body: str, **weights: tuple[int, ...]) -> ir.Model:
    rng = np.random.default_rng(0)
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 20]> m ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, shape in weights.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        array = rng.standard_normal(shape).astype(np.float32)
        value.const_value = ir.tensor(array, name=name)
        model.graph.initializers[name] = value
    return model


@pytest.mark.parametrize("low", [True, False])
def test_only_a_low_rank_product_goes_before_the_bias(low: bool) -> None:
    body = "p = MatMul(x, w) h = Add(p, c) "
    body += "t = MatMul(x, a) d = MatMul(t, b) " if low else "d = MatMul(x, v) "
    model = model_of(
        "float[N,5,8] x, float[8,6] w, float[6] c, float[8,2] a, float[2,6] b, float[8,6] v",
        "float[N,5,6] y", body + "y = Add(h, d)",
        w=(8, 6), c=(6,), a=(8, 2), b=(2, 6), v=(8, 6),
    )  # fmt: skip
    assert DeltaBeforeBias()(model).modified is low


@pytest.mark.parametrize(
    ("bias", "target", "changes"),
    [("6", "3, 5, 6", True), ("15, 6", "3, 5, 6", False), ("6", "0, 2, 3", False)],
)
def test_a_flattened_gemm(bias: str, target: str, changes: bool) -> None:
    """A bias of its own for every row, or a Reshape that copies a size, needs the flat form."""
    shape = tuple(int(n) for n in bias.split(","))
    size = target.count(",") + 1
    model = model_of(
        f"float[3,5,8] x, float[8,6] w, float[{bias}] c", "float[a,b,d] y",
        "f = Constant<value = int64[2] {-1, 8}>() r = Reshape(x, f) g = Gemm(r, w, c) "
        f"s = Constant<value = int64[{size}] {{{target}}}>() y = Reshape(g, s)",
        w=(8, 6), c=shape,
    )  # fmt: skip
    gemm = next(n for n in model.graph if n.op_type == "Gemm")
    gemm.outputs[0].shape = ir.Shape([15, 6])
    assert GemmToMatMul()(model).modified is changes


def run(model: ir.Model, path: Path, feeds: dict[str, Any]) -> list[Any]:
    ir.save(model, path)
    return list(open_session(path, "cpu").run(feeds).values())


def test_a_weight_that_another_node_reads_gets_a_constant_of_its_own(tmp_path: Path) -> None:
    def made() -> ir.Model:
        return model_of(
            "float[N,5,8] x, float[8,6] w", "float[N,5,6] y, float[8,6] z",
            "y = MatMul(x, w) z = Abs(w)", w=(8, 6),
        )  # fmt: skip

    x = np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)
    base = run(made(), tmp_path / "a.onnx", {"x": x})
    model = made()
    graph = OnnxGraph(model)
    target = find(graph)["w"]
    a, b = draw("w", target.layout, 2, 0, "probe")
    Fold({"w": LowRank(a, b, 2.0, target.layout)})(graph)
    got = run(model, tmp_path / "b.onnx", {"x": x})
    w = made().graph.initializers["w"].const_value
    assert w is not None
    exact = x.astype(np.float64) @ (w.numpy().astype(np.float64) + (b.astype(np.float64) @ a).T)
    assert rel(got[0], exact) < 1e-6 and rel(got[0], base[0]) > 0.05
    np.testing.assert_array_equal(got[1], base[1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 12), nn.Linear(12, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("op", ["embedding", "linear"])
def test_an_update_reaches_both_copies_of_a_table(
    op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in its own direction, whichever of them the adapter was trained on.

    torch's exporter makes two of a small table, where nothing keeps it from that.
    """
    model, ids = Tied().eval(), torch.arange(12).reshape(2, 6)
    monkeypatch.setattr(to_onnx, "unfolded", lambda names: lambda node: None)
    lora_fx.export(model, tmp_path / "base.onnx", (ids,), provider="cpu")
    rng = np.random.default_rng(0)
    sides = (50, 12) if op == "embedding" else (12, 50)
    a, b = (rng.standard_normal(s).astype(np.float32) * 0.4 for s in ((3, sides[0]), (sides[1], 3)))
    low = LowRank(a, b, 3.0, origin=Origin(op=op))
    lora_fx.merge(tmp_path / "base.onnx", Adapter({"embed.weight": low}), tmp_path / "m.onnx")
    delta = b.astype(np.float64) @ a
    wide = Tied().eval().double()
    with torch.no_grad():
        wide.embed.weight.add_(torch.tensor(delta.T if op == "embedding" else delta))
        expected = wide(ids).numpy()
    (got,) = open_session(tmp_path / "m.onnx", "cpu").run({"ids": ids.numpy()}).values()
    assert rel(got, expected) < 2e-6


@pytest.mark.parametrize("source", ["torch", "file"])
def test_a_norm_in_a_convolution_that_had_a_bias_is_known_by_its_mark(
    source: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2.0)
    x = (torch.randn(2, 3, 8, 8),)
    path = tmp_path / "o.onnx"
    if source == "file":
        lora_fx.export(model, tmp_path / "plain.onnx", x, provider="cpu")
        lora_fx.export(tmp_path / "plain.onnx", path, optimise=True, provider="cpu")
    else:
        lora_fx.export(model, path, x, optimise=True, provider="cpu")
    adapter = lora_fx.insert(model, x, rank=1, include="*").adapter()
    with pytest.raises(LoraFxError, match="normalisation folded into it"):
        lora_fx.merge(path, adapter, tmp_path / "m.onnx")
