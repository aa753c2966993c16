"""One graph serves both modes where the model's code cannot tell them apart, and no other does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.fc(x).relu())


class Asks(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if self.fc.training else 1)


class Switches(Plain):
    def train(self, mode: bool = True) -> Switches:
        self.factor = 2 if mode else 1
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


class Property(Plain):
    @property
    def mode(self) -> int:
        return 2 if getattr(self, "training", None) else 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.mode


class Branches(Plain):
    """A compiler traces the bodies, and none of its reads is seen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def twice(x: torch.Tensor) -> torch.Tensor:
            return self.out(self.fc(x)) * 2 if self.training else self.out(self.fc(x))

        return torch.cond(x.sum() > 0, twice, lambda x: self.out(self.fc(x)), (x,))


class Draws(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand_like(x[:, :3]) * 0


def hooked() -> nn.Module:
    net = Plain()
    net.fc.register_forward_hook(lambda m, args, y: y * 2 if m.training else y)
    return net


@pytest.mark.parametrize(
    ("build", "graphs"),
    [(Plain, 1), (Asks, 2), (Switches, 2), (Property, 2), (Branches, 2), (Draws, 2), (hooked, 2)],
)  # fmt: skip
def test_one_graph_where_no_mode_is_asked_for(build: Callable[[], Any], graphs: int) -> None:
    torch.manual_seed(0)
    net, x = build(), torch.rand(4, 6)
    net.train(False)
    cap = lora_fx.capture(net, (x,))
    assert len({id(cap.traced(mode, cap.named).graph) for mode in (False, True)}) == graphs
    adapted = lora_fx.insert(cap, rank=2)
    for mode in (False, True):
        adapted.train(mode), net.train(mode)
        torch.testing.assert_close(adapted(x), net(x))
    assert "training" not in vars(nn.Module)


class Paths(Plain):
    """Two rows or more take a path on which no mode is asked for; more than 8 take another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if x.shape[0] > 8:
            y = y * (2 if self.training else 3)
        return y


def test_each_path_for_itself() -> None:
    net, few, many = Paths(), torch.randn(4, 6), torch.randn(9, 6)
    cap = lora_fx.capture(net, (few,))
    assert cap.traced(True, cap.named) is cap.traced(False, cap.named)
    long = [cap.traced(mode, {"x": many}) for mode in (False, True)]
    assert long[0] is not long[1]
    adapted = lora_fx.insert(cap, rank=2)
    for x in (few, many):
        for mode in (False, True):
            adapted.train(mode), net.train(mode)
            torch.testing.assert_close(adapted(x), net(x))
