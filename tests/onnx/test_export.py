"""What an exported file holds, and what the runtime side refuses."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.errors import CaptureError, LoraFxError, NoEffectError
from lora_fx.onnx import Session, TrainSession
from lora_fx.onnx import session as sessions
from lora_fx.onnx.provider_nodes import CUDA
from lora_fx.onnx.session import open_session
from tests.providers import PROVIDERS
from tests.zoo.shared import captured


class Net(nn.Module):
    """A linear (transposed by the exporter), a bare matmul, a dict output with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 8)
        self.w = nn.Parameter(torch.randn(8, 5))
        self.unadapted = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, gain: float = 1.0, *, bias: Any = None) -> dict[str, Any]:
        h = torch.relu(self.fc(x)) * gain
        y = h @ self.w
        if bias is not None:
            y = y + bias
        return {"y": self.unadapted(y), "parts": (h, y.sum(-1))}


def adapted(**kwargs: Any) -> Any:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    cap, *_ = captured("export net", lambda: (Net().eval(), (x,)))
    if kwargs:
        cap = lora_fx.capture(Net().eval(), (x,), kwargs)
    m = lora_fx.insert(cap, rank=2, exclude="unadapted")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in m.named_parameters():
            if "lora_B" in n:
                p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return m


@pytest.mark.parametrize("provider", PROVIDERS)
def test_names_dimensions_and_numbers(tmp_path: Path, provider: str) -> None:
    m = adapted()
    report = lora_fx.export(m, tmp_path / "m.onnx", provider=provider)
    assert {p.of for p in report.parity} == {"fold", "onnxruntime"}
    assert report.details["provider"] == provider
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    names = {i.name for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    assert names == {"fc.weight", "fc.bias", "w", "unadapted.weight", "unadapted.bias"}
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert (model.graph.input[0].name, dims) == ("x", ["batch", 6])
    assert [o.name for o in model.graph.output] == ["y", "parts_0", "parts_1"]
    assert [entry.key for entry in model.metadata_props] == ["lora_fx.probe"]
    assert not any(n.metadata_props for n in model.graph.node)
    x = np.random.default_rng(0).standard_normal((17, 6)).astype(np.float32)
    got = open_session(tmp_path / "m.onnx", provider).run({"x": x})
    assert rel(got["y"], m(torch.from_numpy(x))["y"].detach().numpy()) < 2e-6


def test_constants_and_optional_arguments_are_kept(tmp_path: Path) -> None:
    m = adapted(gain=3.0, bias=torch.ones(5))
    lora_fx.export(m, tmp_path / "m.onnx", provider="cpu")
    session = open_session(tmp_path / "m.onnx", "cpu")
    assert session.input_names == ["x", "bias"]
    feeds = {"x": np.ones((2, 6), np.float32), "bias": np.arange(5, dtype=np.float32)}
    want = m(torch.ones(2, 6), gain=3.0, bias=torch.arange(5.0))["y"].detach().numpy()
    assert rel(session.run(feeds)["y"], want) < 2e-6


def test_large_weights_go_beside_the_file(tmp_path: Path) -> None:
    report = lora_fx.export(adapted(), tmp_path / "m.onnx", provider="cpu", external_over=100)
    assert {Path(f).name for f in report.outputs} == {"m.onnx", "m.onnx.data"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert open_session(tmp_path / "m.onnx", "cpu").run({"x": np.ones((2, 6), np.float32)})
    with pytest.raises(LoraFxError, match="exists"):
        lora_fx.export(adapted(), tmp_path / "m.onnx", external_over=100)
    (tmp_path / "m.onnx").unlink()
    with pytest.raises(LoraFxError, match=r"m\.onnx\.data already exists"):
        lora_fx.export(adapted(), tmp_path / "m.onnx", external_over=100)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx.data"]


def test_the_base_model_and_an_adapter_object(tmp_path: Path) -> None:
    m = adapted()
    x = torch.randn(3, 6)
    lora_fx.export(Net().eval(), tmp_path / "base.onnx", (x,), provider="cpu")
    lora_fx.export(Net().eval(), tmp_path / "a.onnx", (x,), adapters=m.adapter(), provider="cpu")
    feeds = {"x": x.numpy()}
    base = open_session(tmp_path / "base.onnx", "cpu").run(feeds)["y"]
    with_it = open_session(tmp_path / "a.onnx", "cpu").run(feeds)["y"]
    assert rel(base, Net().eval()(x)["y"].detach().numpy()) < 2e-6
    assert rel(with_it, m(x)["y"].detach().numpy()) < 2e-6
    assert rel(with_it, base) > 0.05


def test_the_mode_of_the_module_is_put_back(tmp_path: Path) -> None:
    m = adapted().train()
    lora_fx.export(m, tmp_path / "m.onnx", provider="cpu")
    assert m.training and m.get_submodule("fc").training


def test_a_wrong_graph_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_fx.passes.fold as fold

    real = fold.fold_value
    monkeypatch.setattr(fold, "fold_value", lambda b, u: (real(b, u)[0] * np.float32(1.0001), 1.0))
    with pytest.raises(NoEffectError, match="the fold differs"):
        lora_fx.export(adapted(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_half_precision(tmp_path: Path) -> None:
    model = Net().eval().half()
    m = lora_fx.insert(model, (torch.randn(3, 6).half(),), rank=2)
    report = lora_fx.export(m, tmp_path / "m.onnx", provider="cpu")
    assert report and all(p.tol > 1e-3 for p in report.parity)


def test_rounding_that_swallows_the_change_is_said(tmp_path: Path) -> None:
    model = Net().eval().bfloat16()
    m = lora_fx.insert(model, (torch.randn(3, 6).bfloat16(),), rank=2)
    with torch.no_grad():
        for n, p in m.named_parameters():
            if "lora_B" in n:
                p.fill_(1e-4)
    assert min(f.kept for f in lora_fx.fold(m).folded) < 0.95


def test_tuple_named_tuple_and_plain_outputs(tmp_path: Path) -> None:
    Pair = namedtuple("Pair", "first second")
    torch.utils._pytree._register_namedtuple(Pair, serialized_type_name="tests.Pair")

    class Two(Net):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            h = self.fc(x)
            return Pair(h, h @ self.w)

    m = lora_fx.insert(Two().eval(), (torch.randn(3, 6),), rank=2)
    out = m(torch.randn(3, 6))
    assert type(out) is Pair and out.second.shape == (3, 5)
    lora_fx.export(m, tmp_path / "m.onnx", provider="cpu")
    names = [o.name for o in onnx.load(tmp_path / "m.onnx").graph.output]
    assert names == ["first", "second"]


def test_dynamic_height_on_request_and_pinned_sizes_are_said(tmp_path: Path) -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.fc = nn.Linear(4, 5)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(self.conv(image).mean((2, 3)))
            return out

    x = torch.randn(2, 3, 8, 9)
    plain = lora_fx.capture(Image().eval(), (x,))
    assert plain.inputs.to_json()[0]["shape"] == ["batch", 3, 8, 9]
    free = lora_fx.capture(Image().eval(), (x,), dynamic={"image": {2: "height", 3: "width"}})
    m = lora_fx.insert(free, rank=2, include="*")
    lora_fx.export(m, tmp_path / "m.onnx", provider="cpu")
    shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["batch", 3, "height", "width"]

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(9, 5)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(image)
            return out

    cap = lora_fx.capture(Fixed().eval(), (x,), dynamic={"image": (3,)})
    (pin,) = cap.pinned
    assert (pin.input, pin.dim, pin.size) == ("image", 3, 9)
    assert "test_export.py" in pin.op


def test_what_the_exporter_cannot_translate_is_one_error(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.matrix_exp(self.fc(x).unsqueeze(-1) * x.unsqueeze(-2))

    m = lora_fx.insert(Odd().eval(), (torch.randn(3, 6),), rank=2)
    with pytest.raises(LoraFxError, match="ONNX exporter refused"):
        lora_fx.export(m, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_providers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora_fx.export(adapted(), tmp_path / "m.onnx", provider="cpu")
    monkeypatch.setattr(sessions, "driver_present", lambda: False)
    auto = open_session(tmp_path / "m.onnx")
    assert auto.provider == "cpu" and auto.note == ""  # a machine without a GPU
    with monkeypatch.context() as gpu:
        gpu.setattr(sessions, "driver_present", lambda: True)
        gpu.setattr(sessions, "providers", lambda: ["cpu"])
        assert "running on CPU" in open_session(tmp_path / "m.onnx").note
    assert open_session(tmp_path / "m.onnx", "cpu").note == ""
    with pytest.raises(LoraFxError, match="CUDA was requested"):
        open_session(tmp_path / "m.onnx", "cuda")
    with pytest.raises(LoraFxError, match="unknown provider 'tpu'"):
        open_session(tmp_path / "m.onnx", "tpu")
    (tmp_path / "bad.onnx").write_bytes(b"junk")
    with pytest.raises(LoraFxError, match=r"bad\.onnx: ONNX Runtime cannot load it"):
        open_session(tmp_path / "bad.onnx")


@pytest.mark.parametrize(("exact", "wanted"), [(True, {"use_tf32": "0"}), (False, {})])
def test_products_on_a_gpu_are_of_float32_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool, wanted: dict[str, str]
) -> None:
    """ONNX Runtime's use_tf32 is on by default, and 10 bits of a factor miss every gate."""
    import onnxruntime as ort

    path, own, seen = tmp_path / "m.onnx", ort.InferenceSession, []

    def opened(file: str, options: Any, providers: list[Any]) -> Any:
        seen.append(providers)
        return own(file, options, providers=["CPUExecutionProvider"])

    module = lora_fx.insert(nn.Linear(5, 3), (torch.randn(4, 5),), rank=2)
    lora_fx.export(module, path, mode="train", provider="cpu")
    monkeypatch.setattr(sessions, "driver_present", lambda: True)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(ort, "InferenceSession", opened)
    open_session(path, exact=exact)
    Session(path.with_suffix(".switch.onnx"), exact=exact)
    TrainSession(path, exact=exact)
    assert seen == [[(CUDA, wanted), "CPUExecutionProvider"]] * 3


def test_a_size_of_zero_is_an_error() -> None:
    with pytest.raises(LoraFxError, match="size 0"):
        lora_fx.capture(Net().eval(), (torch.randn(0, 6),))
    one = lora_fx.capture(Net().eval(), (torch.randn(1, 6),))
    assert one.inputs.to_json()[0]["shape"] == ["batch", 6], "1 is sampled again at 2"
    assert issubclass(CaptureError, LoraFxError)
