"""Complex weights have complex A and B; DoRA's lengths are those of complex vectors.

Wrong on 1358f462: A and B were real, so that training moved the real part of a weight alone; DoRA
took √Σz² for a length, started up to 2.7 off and folded up to 12 off; a comparison looked at real
parts alone; and where all parameters are complex, insert left its proof out without a word.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.compare import FOLD_TOL, ORT_TOL, compare, rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.insertion import insertion_of

VARIANTS = ("lora", "rslora", "dora", "lora-fa", "lora+", "qalora:1")
STARTS = ("gaussian", "orthogonal", "pissa", "olora")


class Plain(nn.Module):
    """All parameters are complex; one is read transposed."""

    names = ("w", "v")

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5, dtype=dtype) / 2)
        self.v = nn.Parameter(torch.randn(6, 7, dtype=dtype) / 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.w)
        return (y * torch.tanh(y.abs())) @ self.v


class Layers(nn.Module):
    """nn.Linear and nn.Conv1d with complex weights and biases, an einsum, and a real head."""

    names = ("conv.weight", "linear.weight", "mix")

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 6, 1, dtype=dtype)
        self.linear = nn.Linear(6, 7, dtype=dtype)
        self.mix = nn.Parameter(torch.randn(3, 7, dtype=dtype) / 2)
        self.head = nn.Linear(3, 2, dtype=dtype.to_real())

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.conv(x[..., None])[..., 0])
        y = torch.einsum("bi,oi->bo", y / (1 + y.abs()), self.mix)
        out: Tensor = self.head(y.abs())
        return out


MODELS: dict[str, Any] = {"plain": Plain, "layers": Layers}
DTYPES = {"64": torch.complex64, "128": torch.complex128}
TWO = ["64", pytest.param("128", marks=pytest.mark.slow)]


def built(name: str, dtype: torch.dtype = torch.complex64) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return MODELS[name](dtype).eval(), torch.randn(4, 5, dtype=dtype)


def out(model: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x).numpy()


def moved(module: Any) -> Any:
    """The module with random numbers added to all that it trains."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return module


def changed_weight(base: Any, low: LowRank) -> Any:
    """W' by hand in complex128, in the stored shape."""
    layout = low.layout
    assert layout is not None
    w = base.astype(np.complex128)
    turned = w.ndim == 2 and layout.out == (1,)
    matrix = (w.T if turned else w).reshape(layout.out_size, -1)
    new = matrix + low.scale * low.b.astype(np.complex128) @ low.a.astype(np.complex128)
    if low.magnitude is not None:
        length = np.sqrt((new.real**2 + new.imag**2).sum(1))
        new = new * (low.magnitude / length)[:, None]
    return (new.T if turned else new).reshape(w.shape)


def by_hand(model: Any, x: Tensor, adapter: Any) -> Any:
    """The model's own code in complex128 with W' in the place of W."""
    wide = copy.deepcopy(model)
    for p in wide.parameters():
        p.data = p.data.to(torch.complex128 if p.is_complex() else torch.float64)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for key, low in adapter.lowrank.items():
            new = changed_weight(named[key].detach().numpy(), low)
            wide.get_parameter(key).copy_(torch.from_numpy(new))
        return wide(x.to(torch.complex128)).numpy()


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, name: str, dtype: str) -> None:
    model, x = built(name, DTYPES[dtype])
    before = out(model, x)
    include = list(MODELS[name].names)
    module: Any = lora_fx.insert(model, (x,), rank=2, include=include, variant=variant)
    assert set(module.updates) == set(include)
    assert insertion_of(module).effect.modes == ("eval", "train")
    assert rel(out(module, x), before) < FOLD_TOL
    factors = {n: p.dtype for n, p in module.named_parameters() if ".lora_A" in f".{n}"}
    assert set(factors.values()) == {torch.complex64}
    moved(module)
    adapter = module.adapter()
    want = by_hand(model, x, adapter)
    assert 0.05 < rel(want, before) < 50
    assert rel(out(module, x), want) < 2 * ORT_TOL
    assert rel(out(lora_fx.fold(module), x), want) < 2 * ORT_TOL
    assert all(np.abs(low.b.imag).max() > 0.01 for low in adapter.lowrank.values())
    lora_fx.attach(model, (x,), adapter=adapter)
    assert rel(out(model, x), want) < 2 * ORT_TOL
    lora_fx.detach(model)
    assert np.array_equal(out(model, x), before)


@pytest.mark.parametrize("init", STARTS)
def test_starts(init: str) -> None:
    model, x = built("plain")
    module: Any = lora_fx.insert(model, (x,), rank=2, init=init)
    assert rel(out(module, x), out(model, x)) < FOLD_TOL
    low = next(iter(module.adapter().lowrank.values()))
    assert np.abs(low.a.imag).max() > 1e-3
    moved(module)
    assert rel(out(module, x), by_hand(model, x, module.adapter())) < ORT_TOL


def test_gradients_are_those_of_the_sum() -> None:
    """∂|y|²/∂A and ∂B of s·B·A in the weight, by torch's own autograd of the plain model."""
    model, x = built("plain", torch.complex128)
    module: Any = moved(lora_fx.insert(model, (x,), rank=2))
    module(x).abs().square().sum().backward()
    low = module.adapter().lowrank["w"]
    a, b = (torch.from_numpy(t).to(torch.complex128).requires_grad_() for t in (low.a, low.b))
    v = torch.from_numpy(changed_weight(model.v.detach().numpy(), module.adapter().lowrank["v"]))
    y = F.linear(x, model.w.detach() + low.scale * b @ a)
    ((y * torch.tanh(y.abs())) @ v).abs().square().sum().backward()
    got = dict(module.named_parameters())
    for name, want in (("lora_A.w", a.grad), ("lora_B.w", b.grad)):
        assert want is not None
        assert rel(got[name].grad.numpy(), want.numpy()) < 1e-5
        assert want.imag.abs().max() > 1e-3


def test_a_difference_of_imaginary_parts_is_one() -> None:
    y = np.array([1 + 1j, 2 - 1j])
    assert rel(y, y) == 0
    assert rel(y + 0.5j, y) > 0.1
    assert not compare({"y": y + 0.5j}, {"y": y}, {}, 1e-6).ok
    assert rel(np.zeros(2, np.complex64), np.zeros(2, np.complex64)) == np.inf


def test_a_whole_tensor_and_a_mix() -> None:
    model, x = built("plain")
    module: Any = moved(lora_fx.insert(model, (x,), rank=2, include="w", also_train="v"))
    (full,) = module.adapter().full.values()
    assert isinstance(full, Full)
    assert full.value.dtype == np.complex64
    folded = lora_fx.fold(model, (x,), adapter=module.adapter())
    assert rel(out(folded, x), out(module, x)) < ORT_TOL


def test_truncated() -> None:
    model, x = built("plain")
    adapter = moved(lora_fx.insert(model, (x,), rank=3)).adapter()
    deltas = adapter.deltas(dtype="complex128")
    short = lora_fx.truncate(adapter, rank=2)
    for key, delta in short.deltas(dtype="complex128").items():
        u, s, vh = np.linalg.svd(deltas[key])
        best = (u[:, :2] * s[:2]) @ vh[:2]
        assert rel(delta, best) < 1e-5


def test_real_factors_of_an_older_adapter_are_taken(tmp_path: Path) -> None:
    model, x = built("plain")
    low = lora_fx.insert(model, (x,), rank=2, include="w").adapter().lowrank["w"]
    real = LowRank(low.a.real.copy(), low.a.real.T.copy()[:, :2][[0, 1, 2, 3, 4, 0]], 4.0)
    adapter = lora_fx.Adapter({"w": real})
    module = lora_fx.insert(model, (x,), adapter=adapter)
    assert rel(out(module, x), by_hand(model, x, module.adapter())) < ORT_TOL
    lora_fx.save_adapter(adapter, tmp_path / "real")


class Real(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


def test_complex_factors_of_a_real_weight_are_refused() -> None:
    model, x = built("plain")
    adapter = lora_fx.insert(model, (x,), rank=2, include="w").adapter()
    with pytest.raises(LoraFxError, match="complex A and B; the weight is float32"):
        lora_fx.fold(Real().eval(), (torch.randn(4, 5),), adapter=adapter)


@pytest.mark.parametrize("form", ["peft", "kohya", "diffusers", "onnx_adapter", "gguf"])
def test_adapter_files_are_refused(form: Any, tmp_path: Path) -> None:
    model, x = built("plain")
    adapter = lora_fx.insert(model, (x,), rank=2).adapter()
    path = tmp_path / ("a.onnx_adapter" if form == "onnx_adapter" else "a.safetensors")
    with pytest.raises(LoraFxError, match="complex A and B") as caught:
        lora_fx.save_adapter(adapter, path, format=form)
    assert caught.value.exit_code == 2
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("mode", ["merged", "switch", "batch", "load"])
@pytest.mark.parametrize("name", MODELS)
def test_onnx_is_right_or_refused(name: str, mode: Any, tmp_path: Path) -> None:
    model, x = built(name)
    adapter = moved(lora_fx.insert(model, (x,), rank=2)).adapter()
    with pytest.raises(LoraFxError) as caught:
        lora_fx.export(
            model, tmp_path / "m.onnx", (x,), adapters=adapter, mode=mode, provider="cpu"
        )
    assert "complex" in caught.value.message
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_pt2_file_keeps_them(variant: str, tmp_path: Path) -> None:
    from lora_fx.passes.verbs.open import load_program
    from lora_fx.passes.verbs.program import save_program

    model, x = built("plain")
    module: Any = moved(lora_fx.insert(model, (x,), rank=2, variant=variant))
    save_program(module, tmp_path / "m.pt2")
    again = load_program(tmp_path / "m.pt2")
    assert rel(out(again, x), out(module, x)) < FOLD_TOL
    assert rel(out(lora_fx.fold(again), x), out(module, x)) < ORT_TOL


def test_a_checkpoint_of_complex_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, x = built("plain")
    save_file(dict(model.state_dict()), tmp_path / "b.safetensors")
    adapter = lora_fx.insert(model, (x,), rank=2, include="w").adapter()
    with pytest.raises(LoraFxError, match="complex64"):
        lora_fx.merge(tmp_path / "b.safetensors", adapter, tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()
