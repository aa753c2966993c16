"""Sizes that a model fixes by its arithmetic, and hooks of the model itself."""

from __future__ import annotations

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
