"""Sizes that a model fixes by its arithmetic, and hooks of the model itself."""

from __future__ import annotations

from typing import Any

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


def test_a_signal_of_one_length_has_both_sizes_said() -> None:
    cap = lora_fx.capture(Signal(3, 64).eval(), (torch.randn(2, 3, 64),))
    assert [(pin.input, pin.dim, pin.size) for pin in cap.pinned] == [("x", 1, 3), ("x", 2, 64)]


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
