"""find, insert and fold are written once: the same passes on fx, on ONNX and in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.compare import rel
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert
from lora_fx.passes.verbs.open import capture

TEXT = """
<ir_version: 10, opset_import: ["": 20]>
m (float[N, 6] x, float[6, 4] w1, float[5, 4] w2, float[4, 6] w3)
  => (float[N, 5] y, float[N, 6] z)
{
    h = MatMul(x, w1)
    w2t = Transpose<perm = [1, 0]>(w2)
    y = MatMul(h, w2t)
    w1t = Transpose<perm = [1, 0]>(w1)
    z0 = MatMul(h, w1t)
    z1 = MatMul(h, w3)
    z = Add(z0, z1)
}
"""


class Same(nn.Module):
    """TEXT as a module: w1 is used both ways round."""

    def __init__(self, weights: dict[str, np.ndarray[Any, Any]]) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(value)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x @ self.w1
        return h @ self.w2.t(), h @ self.w1.t() + h @ self.w3


def weights() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    shapes = {"w1": (6, 4), "w2": (5, 4), "w3": (4, 6)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def onnx_model() -> ir.Model:
    model = ir.from_onnx_text(TEXT)
    for v in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(v)
        v.const_value = ir.tensor(weights()[str(v.name)], name=v.name)
        model.graph.initializers[str(v.name)] = v
    return model


def run(model: ir.Model, x: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, {"x": x})


def updates(found: Any) -> dict[str, LowRank]:
    result = {}
    for t in found.targets:
        a, b = draw(t.key, t.layout, 2, 0, "probe")
        result[t.key] = LowRank(a, b * 0.3, 3.0, t.layout)
    return result


def reference(x: np.ndarray[Any, Any], deltas: dict[str, np.ndarray[Any, Any]]) -> list[Any]:
    w = {k: v.astype(np.float64) + deltas.get(k, 0) for k, v in weights().items()}
    h = x.astype(np.float64) @ w["w1"]
    return [h @ w["w2"].T, h @ w["w1"].T + h @ w["w3"]]


def test_same_keys_and_numbers_in_both_irs() -> None:
    x = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    fx_graph = capture(Same(weights()), (torch.from_numpy(x),)).fx_graph()
    onnx_graph = OnnxGraph(onnx_model())
    found, found_onnx = find(fx_graph), find(onnx_graph)
    assert [t.key for t in found.targets] == [t.key for t in found_onnx.targets]
    assert [t.layout for t in found.targets] == [t.layout for t in found_onnx.targets]
    assert [len(t.sites) for t in found.targets] == [2, 1, 1]

    change = updates(found)
    from lora_fx.adapter.adapter import Adapter

    want = reference(x, Adapter(change).deltas())
    base = reference(x, {})
    assert all(0.05 < rel(a, b) < 5 for a, b in zip(want, base, strict=True))

    results: dict[str, list[Any]] = {}
    for name, step in (("insert", Insert(change)), ("fold", Fold(change))):
        graph = OnnxGraph(onnx_model())
        assert step(graph).modified
        graph.lint()
        results[f"onnx {name}"] = run(graph.model, x)
        assert not step(graph).modified, "a second run must change nothing"

        module = Same(weights())
        traced = capture(module, (torch.from_numpy(x),)).fx_graph(root=module)
        again = type(step)(change)
        assert again(traced).modified
        gm = torch.fx.GraphModule(module, traced.graph)
        results[f"fx {name}"] = [t.detach().numpy() for t in gm(torch.from_numpy(x))]
        assert not again(traced).modified
    for name, got in results.items():
        for a, b in zip(got, want, strict=True):
            assert rel(a, b) < 1e-6, name


def test_zero_b_is_the_identity_in_onnx() -> None:
    x = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    graph = OnnxGraph(onnx_model())
    found = find(graph)
    zero = {}
    for t in found.targets:
        a, b = draw(t.key, t.layout, 2, 0)
        zero[t.key] = LowRank(a, b, 4.0, t.layout)
    Insert(zero)(graph)
    for a, b in zip(run(graph.model, x), run(onnx_model(), x), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("training", [False, True])
def test_lstm_in_weight_form(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.LSTM(6, 5, num_layers=2, batch_first=True).eval()
    x = torch.randn(3, 7, 6)
    import lora_fx
    from lora_fx.adapter.adapter import Adapter

    module = lora_fx.insert(model, (x,), rank=2)
    assert len(module.updates) == 4
    change = {
        k: LowRank(*draw(k, v.layout, 2, 1, "probe"), 1.0, v.layout)
        for k, v in module.updates.items()
    }
    module.load_adapter(Adapter(change))
    deltas = Adapter(change).deltas(dtype="float64")
    state = {
        n: p.double() + torch.from_numpy(deltas[n]) if n in deltas else p.double()
        for n, p in model.named_parameters()
    }
    want = torch.func.functional_call(model.double(), state, (x.double(),))[0].detach()
    module.train(training)
    got = module(x)[0]
    assert rel(got.detach().numpy(), want.numpy()) < 2e-6
    got.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for p in module.parameters()
        if p.requires_grad
    )
