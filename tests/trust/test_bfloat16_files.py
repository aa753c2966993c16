"""A float32 file of a bfloat16 model has W + s·BA in float32, rounded once during the export.

On 1358f462 the sum was rounded to bfloat16 first, and then written in float32: of an update of one
thousandth of W about half of the numbers were W's own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.compare import rel
from tests.trust.tied import TIED, built

NEAR = 2.0**-22
"""Two steps of float32: the sum in fp64, rounded, against the sum in fp32."""


class Layers(nn.Module):
    """A linear, a transposed product, a convolution and a fused weight of which parts are read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.turned = nn.Parameter(torch.randn(12, 10) / 3)
        self.conv = nn.Conv1d(10, 9, 3, padding=1)
        self.fused = nn.Parameter(torch.randn(12, 9) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x)) @ self.turned
        y = torch.tanh(self.conv(y.transpose(1, 2))).transpose(1, 2)
        return F.linear(y, self.fused[:4]) * F.linear(y, self.fused[4:8]) + F.linear(
            y, self.fused[8:]
        )


def model_of() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return Layers().eval().bfloat16(), torch.randn(2, 5, 8).bfloat16()


def adapter_of(model: Any, x: Any, size: float, **options: Any) -> Any:
    """A trained adapter whose changes are as small as this beside W."""
    module: Any = lora_fx.insert(model, (x,), rank=2, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * size)
    return module.adapter()


def wanted(model: Any, adapter: Any) -> dict[str, Any]:
    """Every weight that changes, in fp64, by hand."""
    named = dict(model.named_parameters())
    weights: dict[str, Any] = {}
    for key, low in adapter.lowrank.items():
        name = key.partition("[")[0]
        w = weights.setdefault(name, named[name].detach().double().numpy().copy())
        delta = low.scale * low.b.astype(np.float64) @ low.a.astype(np.float64)
        part = w if "[" not in key else w[slice(*map(int, key[:-1].split("[")[1].split(":")))]
        if low.layout.out == (1,):
            delta = delta.T
        new = part + delta.reshape(part.shape)
        if low.magnitude is not None:
            length = np.linalg.norm(new.reshape(len(new), -1), axis=1)
            new *= (low.magnitude / length).reshape(-1, *[1] * (new.ndim - 1))
        part[...] = new
    return weights | {k: f.value.astype(np.float64) for k, f in adapter.full.items()}


def initialisers(path: Path) -> dict[str, Any]:
    graph = onnx.load(path).graph
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer}


def check_parts(stored: list[Any], want: Any, name: str) -> None:
    """Every row that changes is in one of the constants."""
    for row in range(len(want)):
        assert min(rel(t[row], want[row]) for t in stored) < NEAR, (name, row)


def check(path: Path, weights: dict[str, Any]) -> None:
    stored = initialisers(path)
    for name, want in weights.items():
        parts = [k for k in stored if k.startswith(f"{name}_folded")]
        if parts:  # uses of other parts have constants of their own
            check_parts([stored[k] for k in stored if k.startswith(name)], want, name)
            continue
        got = stored[name]
        assert got.dtype == np.float32
        got = got if got.shape == want.shape else got.T
        assert rel(got, want) < NEAR, name


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"include": "*"},
    "rslora": {"include": "*", "variant": "rslora"},
    "dora": {"include": "linear", "variant": "dora"},
    "whole": {"include": "linear", "also_train": "turned,conv.bias"},
    "part": {"include": "fused[4:8]"},
    "pissa": {"include": "linear", "init": "pissa"},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_export(kind: str, tmp_path: Path) -> None:
    model, x = model_of()
    adapter = adapter_of(model, x, 1e-3, **ADAPTERS[kind])
    report = lora_fx.export(model, tmp_path / "m.onnx", (x,), adapters=adapter, provider="cpu")
    weights = wanted(model, adapter)
    assert len(weights) >= 1
    # rounded to bfloat16, it would be this far off
    coarse = {n: torch.from_numpy(w).bfloat16().double().numpy() for n, w in weights.items()}
    assert any(rel(coarse[n], w) > 100 * NEAR for n, w in weights.items())
    check(tmp_path / "m.onnx", weights)
    assert not any(
        "rounding kept" in line or "during the export" in line for line in report.warnings
    )


def test_an_inserted_module_and_a_folded_one(tmp_path: Path) -> None:
    model, x = model_of()
    module: Any = lora_fx.insert(model, (x,), rank=2)
    adapter = adapter_of(model, x, 1e-3)
    module.load_adapter(adapter)
    for i, given in enumerate((module, lora_fx.fold(module))):
        lora_fx.export(given, tmp_path / f"{i}.onnx", provider="cpu")
        check(tmp_path / f"{i}.onnx", wanted(model, adapter))


@pytest.mark.parametrize("include", ["*", "role:head", "role:embedding"])
def test_tied_tables(include: str, tmp_path: Path) -> None:
    """A copy of one use, and a table of both that the file has once or twice."""
    model, ids = built(TIED["Aliased"])
    model = model.bfloat16()
    adapter = adapter_of(model, ids, 1e-3, include=include)
    lora_fx.export(model, tmp_path / "m.onnx", (ids,), adapters=adapter, provider="cpu")
    (low,) = adapter.lowrank.values()
    delta = low.scale * low.b.astype(np.float64) @ low.a.astype(np.float64)
    table = model.emb.weight.detach().double().numpy()
    want = table + (delta if delta.shape == table.shape else delta.T)
    stored = [t for t in initialisers(tmp_path / "m.onnx").values() if t.size == want.size]
    found = [
        min(rel(t, want), rel(t.T, want)) if t.shape != want.shape else rel(t, want)
        for t in stored
        if t.shape in (want.shape, want.T.shape)
    ]
    assert min(found) < NEAR
    assert len(found) == (1 if include == "*" else 2)


def test_outputs_are_those_of_the_wide_sum(tmp_path: Path) -> None:
    model, x = model_of()
    adapter = adapter_of(model, x, 3e-2)
    lora_fx.export(model, tmp_path / "m.onnx", (x,), adapters=adapter, provider="cpu")
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, w in wanted(model, adapter).items():
            wide.get_parameter(name).copy_(torch.from_numpy(w))
        want = wide(x.double()).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.float().numpy()})
    assert rel(got, want) < 2e-6


@pytest.mark.parametrize("precision", ["float16"])
def test_other_precisions_round_once(precision: Any, tmp_path: Path) -> None:
    """The float16 of a file is the float32 sum, rounded, and not bfloat16's."""
    model, x = model_of()
    adapter = adapter_of(model, x, 1e-3, include="linear")
    lora_fx.export(
        model, tmp_path / "m.onnx", (x,), adapters=adapter, precision=precision, provider="cpu"
    )
    want = wanted(model, adapter)["linear.weight"]
    stored = [t for t in initialisers(tmp_path / "m.onnx").values() if t.size == want.size]
    once = want.astype(np.float32).astype(np.float16).astype(np.float64)
    wide = [t.astype(np.float64) for t in stored]
    found = [rel(t, once) if t.shape == once.shape else rel(t.T, once) for t in wide]
    assert min(found) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_merge_into_another_dtype(dtype: str, tmp_path: Path) -> None:
    """A twin that was right: a merge adds in fp32 and rounds once."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(12, 8, generator=generator).bfloat16()
    save_file({"layer.weight": w}, tmp_path / "b.safetensors")
    a, b = (torch.randn(n, m, generator=generator).numpy() for n, m in ((2, 8), (12, 2)))
    adapter = lora_fx.Adapter({"layer.weight": LowRank(a, b * np.float32(1e-3), 4.0)})
    lora_fx.merge(tmp_path / "b.safetensors", adapter, tmp_path / "o.safetensors", dtype=dtype)
    want = w.double().numpy() + 2.0 * (b * np.float32(1e-3)).astype(np.float64) @ a
    got = load_file(tmp_path / "o.safetensors")["layer.weight"]
    assert str(got.dtype) == f"torch.{dtype}"
    limit = {"float32": NEAR, "float16": 2.0**-11, "float64": 1e-12}[dtype]
    assert rel(got.double().numpy(), want) < limit


def test_a_whole_tensor_keeps_its_numbers(tmp_path: Path) -> None:
    model, x = model_of()
    value = np.linspace(-1, 1, 12, dtype=np.float32)
    adapter = lora_fx.Adapter({"linear.bias": Full(value)})
    lora_fx.export(model, tmp_path / "m.onnx", (x,), adapters=adapter, provider="cpu")
    assert np.array_equal(initialisers(tmp_path / "m.onnx")["linear.bias"], value)
