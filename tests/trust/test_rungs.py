"""The rungs of a capture: what torch.export refuses is recorded, where a run can stand for others.

On 788628f none of Rows, Scaled and Counted could be captured; Signed and Peeled were refused then
as they are now, since another input takes another path.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.fx.module.insertion import insertion_of
from tests.fx.module.test_module import perturb
from tests.trust.test_gradients import Reverse


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


class Rows(Two):
    """Picks rows, and asks Python how many there are."""

    def forward(self, x: Tensor) -> Any:
        kept = (x.abs().sum(1) >= 0).nonzero()[:, 0]
        h = self.a(x)
        return {"y": self.b(h[kept] * 1.5 if kept.numel() > 1 else h)}


class Scaled(Two):
    """Reads a value, which cancels."""

    def forward(self, x: Tensor) -> Any:
        largest = float(self.a(x).detach().numpy().max())
        return self.b(self.a(x) / largest * largest)


class Counted(Two):
    def forward(self, x: Tensor) -> Any:
        steps = int((x == x).sum()) // x.numel() + 1
        for _ in range(steps):
            x = self.a(x)
        return self.b(x)


class ReversedRows(Rows):
    def forward(self, x: Tensor) -> Any:
        return super().forward(Reverse.apply(x + self.a(x)))


class Signed(Two):
    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x) if x.sum() > 0 else x)


class Peeled(Two):
    def forward(self, x: Tensor) -> Any:
        while x.abs().max() > 1:
            x = self.a(x) / 4
        return self.b(x)


RECORDED = [Rows, Scaled, Counted]


def example() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4)


@pytest.mark.parametrize("kind", RECORDED)
def test_one_run_serves_its_sizes_and_says_so(kind: type[Two]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), example()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    module = lora_fx.insert(model, (x,), rank=2, include="*")
    assert set(module.updates) == {"a.weight", "b.0.weight"}
    assert {p.rung for p in insertion_of(module).found.pinned} == {"recorded"}
    assert "one recorded run" in str(module.report())
    perturb(module)
    by_hand = copy.deepcopy(model)
    for key, delta in module.adapter().deltas().items():
        by_hand.get_parameter(key).data += torch.from_numpy(np.asarray(delta)).float()
    for value in (x, torch.randn(3, 4), torch.randn(5, 4)):  # other rows: another run
        got, want = (out(m(value)) for m in (module.eval(), by_hand))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    out(module.train()(x)).square().sum().backward()
    assert all(
        a.grad is not None and b.grad is not None for a, b in insertion_of(module).slots().values()
    )
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def out(result: Any) -> Tensor:
    found: Tensor = result["y"] if isinstance(result, dict) else result
    return found


@pytest.mark.parametrize("kind", [Signed, Peeled])
def test_a_path_that_values_decide_is_refused(kind: type[Two]) -> None:
    torch.manual_seed(0)
    with pytest.raises(lora_fx.LoraFxError, match="depends on a tensor's value"):
        lora_fx.insert(kind().eval(), (example(),), rank=2, include="*")


def test_a_recorded_run_is_exported_at_its_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = lora_fx.insert(Scaled().eval(), (example(),), rank=2, include="*")
    perturb(module)
    report = lora_fx.export(module, tmp_path / "m.onnx")
    assert any("is fixed at 3" in w for w in report.warnings)
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 4)
    got = session.run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(got, module(x).detach(), rtol=1e-5, atol=1e-5)
    assert session.get_inputs()[0].shape == [3, 4]


def test_every_module_of_a_recorded_run_is_named() -> None:
    found = lora_fx.find(Rows().eval(), (example(),))
    sites = [site for t in found.targets for site in t.sites]
    assert [(s.scope, s.module_class) for s in sites] == [("a", "Linear"), ("b.0", "Linear")]


class Dropping(nn.Module):
    """Leaves layers out at random in train mode, as Wav2Vec2 and BART do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            drawn = torch.rand([])
            if self.training and drawn < 0.9:
                continue
            x = torch.tanh(layer(x))
        return x


def test_no_layer_is_dropped_in_a_train_graph() -> None:
    torch.manual_seed(0)
    model, x = Dropping().eval(), example()
    module = lora_fx.insert(model, (x,), rank=2)
    perturb(module)
    torch.testing.assert_close(module.train()(x), module.eval()(x))
    module.train()(x).sum().backward()
    assert all(a.grad is not None for a, _ in insertion_of(module).slots().values())
    assert "no layer is dropped in train mode" in str(module.report())


class Counting(nn.Module):
    """Changes buffers in forward, in place and by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1.0)
        self.mean = 0.9 * self.get_buffer("mean") + 0.1 * x.mean((0, 1))
        h: Tensor = self.a(x) if x.shape[1] > 1 else self.a(x.flip(1))
        return h + self.get_buffer("calls") * 0


class CountingRows(Counting):
    def forward(self, x: Tensor) -> Tensor:
        kept = (x.abs().sum(2) >= 0).flatten().nonzero()[:, 0]
        return super().forward(x) * (1.0 if kept.numel() > 1 else 2.0)


@pytest.mark.parametrize("kind", [Counting, CountingRows])
def test_the_users_model_is_not_touched(kind: type[Counting]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 6, 4)
    module = lora_fx.insert(model, (x,), rank=2)
    module(torch.randn(2, 1, 4))
    assert float(model.get_buffer("calls")) == 0
    assert float(model.get_buffer("mean").abs().sum()) == 0


class Masking(nn.Module):
    """Draws with numpy in train mode, as SpecAugment does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * torch.from_numpy(np.random.rand(*x.shape[:2]) > 0.5)[..., None]
        return self.a(x)


def test_what_numpy_draws_in_train_mode_is_not_recorded() -> None:
    model, x = Masking().eval(), torch.randn(2, 6, 4)
    module = lora_fx.insert(model, (x,), rank=2)
    assert "train mode is not proven" in str(module.report())
    with pytest.raises(lora_fx.LoraFxError, match="in train mode"):
        module.train()(x)


def test_a_recorded_run_notices_gradients_of_its_own() -> None:
    torch.manual_seed(0)
    with pytest.raises(lora_fx.LoraFxError, match="custom gradient"):
        lora_fx.insert(ReversedRows().eval(), (example(),), rank=2)


class Flagged(Rows):
    def forward(self, scale: float, x: Tensor, turned: bool = False) -> Any:  # type: ignore[override]
        return super().forward(x.flip(1) if turned else x)["y"] * scale


def test_a_recorded_call_has_constants_too() -> None:
    torch.manual_seed(0)
    model, x = Flagged().eval(), example()
    module = lora_fx.insert(model, (2.0, x), {"turned": True}, rank=2)
    torch.testing.assert_close(module(2.0, x, turned=True), model(2.0, x, turned=True))


class Silenced(Rows):
    """A layer that no gradient reaches, in a model of which there is one recorded run."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return {"y": super().forward(x)["y"] + 0.0 * self.c(x)}


def test_a_dead_target_by_name_is_an_error_of_attach_too() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(lora_fx.LoraFxError, match=r"no gradient reaches c\.weight"):
        lora_fx.attach(Silenced().eval(), (x,), rank=2, include="c")
    live = Silenced().eval()
    lora_fx.attach(live, (x,), rank=2)
    assert not any(n.startswith("c.") and "lora" in n for n, _ in live.named_parameters())
