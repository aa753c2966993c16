"""Sizes that a model fixes by its arithmetic, and hooks of the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import nn

import lora_fx


class Blocks(nn.Module):
    """Takes 16 steps, said by a quotient."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x).unflatten(1, (-1, 4)).sum(2)
        return y + self.table


def test_an_equation_in_one_size_pins_it_by_name() -> None:
    model, x = Blocks().eval(), torch.randn(2, 16, 6)
    cap = lora_fx.capture(model, (x,))
    assert [(p.input, p.dim, p.size) for p in cap.pinned] == [("x", 1, 16)]
    m = lora_fx.insert(cap, rank=2)
    assert torch.equal(m(torch.cat([x, x])), model(torch.cat([x, x])))


class Signal(nn.Module):
    """A net on [N, C, L], whose length may be free."""

    def __init__(self, channels: int, length: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, 6, 5)
        self.out = nn.Linear((length - 4) * 6 if length else 6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x))
        return self.out(y.flatten(1) if self.out.in_features > 6 else y.mean(-1))


@pytest.mark.parametrize("channels", [3, 1])
def test_the_length_of_a_signal_is_free(channels: int) -> None:
    """Dimension 1 of [N, C, L] is no sequence; what is fixed is said once."""
    model = Signal(channels).eval()
    cap = lora_fx.capture(model, (torch.randn(2, channels, 64),))
    assert not cap.pinned
    assert cap.inputs.to_json()[0]["shape"] == ["batch", channels, "length"]
    (note,) = cap.notes
    assert f"signal of {channels} channel" in note and "dimension 2 may vary" in note
    m = lora_fx.insert(cap, rank=2)
    x = torch.randn(3, channels, 41)
    assert torch.equal(m(x), model(x)) and torch.equal(m.train()(x), model(x))


def test_a_signal_of_one_length_has_each_size_said_once() -> None:
    """The channels by a note, and the length with the line that fixes it."""
    cap = lora_fx.capture(Signal(3, 64).eval(), (torch.randn(2, 3, 64),))
    (pin,) = cap.pinned
    assert (pin.input, pin.dim, pin.size) == ("x", 2, 64) and "self.out" in pin.op
    assert cap.notes == ["'x' is a signal of 3 channels: dimension 1 is fixed"]
    assert repr(cap) == "Captured(Signal, x: float32 ['batch', 3, 64])"


class Pooled(nn.Module):
    """A net whose pooling torch traces at one length."""

    def __init__(self, **pooling: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 5)
        self.pool = nn.MaxPool1d(**pooling)
        self.out = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.pool(torch.relu(self.conv(x))).mean(-1))


@pytest.mark.parametrize(
    "pooling",
    [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}],
)
def test_a_maximum_over_windows_leaves_the_length_free(pooling: dict[str, Any]) -> None:
    model = Pooled(**pooling).eval()
    cap = lora_fx.capture(model, (torch.randn(2, 3, 64),))
    assert [pin for pin in cap.pinned if pin.dim == 2] == []  # a pin would be captured again
    assert repr(cap) == "Captured(Pooled, x: float32 ['batch', 3, 'length'])"
    module = lora_fx.insert(cap, rank=2)
    for length in (33, 64, 101):
        x = torch.randn(3, 3, length)
        assert torch.equal(module(x), model(x))


def test_a_maximum_over_windows_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pooled.onnx"
    model = Pooled(kernel_size=2).eval()
    lora_fx.export(model, file, (torch.randn(2, 3, 64),), provider="cpu")
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 47)
    (y,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-5, atol=1e-6)


class Towers(nn.Module):
    """Two signals, of which one has a fixed length; or one of them is no signal."""

    def __init__(self, *, rows: bool = False) -> None:
        super().__init__()
        self.one = Signal(3)
        self.two = nn.Sequential(nn.Flatten(1), nn.Linear(160, 4)) if rows else Signal(2, 80)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.one(x) + self.two(y)
        return out


@pytest.mark.parametrize(
    ("rows", "fixed"), [(False, [("y", 2, 80)]), (True, [("y", 1, 2), ("y", 2, 80)])]
)
def test_a_fixed_length_leaves_another_signal_free(rows: bool, fixed: list[Any]) -> None:
    model = Towers(rows=rows).eval()
    cap = lora_fx.capture(model, (torch.randn(2, 3, 64), torch.randn(2, 2, 80)))
    assert [(pin.input, pin.dim, pin.size) for pin in cap.pinned] == fixed
    shown = "x: float32 ['batch', 3, 'x_length'], y: float32 ['batch', 2, 80]"
    assert repr(cap) == f"Captured(Towers, {shown})"
    x, y = torch.randn(3, 3, 41), torch.randn(3, 2, 80)
    assert torch.equal(lora_fx.insert(cap, rank=2)(x, y), model(x, y))


@pytest.mark.parametrize("options", [{"static": ["x:2"]}, {"dynamic": {"x": {0: "rows"}}}])
def test_a_signal_whose_sizes_a_user_names_is_left_alone(options: dict[str, Any]) -> None:
    cap = lora_fx.capture(Signal(3).eval(), (torch.randn(2, 3, 64),), **options)
    assert [pin.dim for pin in cap.pinned] == [1] and not cap.notes


def test_a_broadcast_dimension_of_the_example_stays_one() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(x) * scale
            return out

    model, args = Scaled().eval(), (torch.randn(2, 5, 6), torch.randn(2, 1, 1))
    m = lora_fx.insert(model, args, rank=2)
    assert torch.equal(m(*args), model(*args))


def test_hooks_of_the_model_itself_are_captured() -> None:
    model = nn.Linear(6, 4).eval()
    model.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    model.register_forward_hook(lambda m, a, out: out + 1)
    x = torch.randn(3, 6)
    m = lora_fx.insert(model, (x,), rank=2)
    torch.testing.assert_close(m(x), model(x))
