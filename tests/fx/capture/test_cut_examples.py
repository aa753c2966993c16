"""The strides of an example are no sizes: one that is cut from a larger tensor serves as any other.

Before, the steps of `mask[:, :16]` became a dimension of their own, which no other call has, and
insert refused the model: no backward pass ran.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.fx.module.execution import execution_of


@pytest.mark.parametrize(
    "cut",
    [
        lambda n: torch.ones(2, 40, dtype=torch.long)[:, :n],
        lambda n: torch.ones(1, n, dtype=torch.long).expand(2, n),
    ],
    ids=["cut", "expanded"],
)
def test_the_steps_of_an_example_are_no_sizes(cut: Callable[[int], torch.Tensor]) -> None:
    """A mask that is cut from a longer one: calls with another are the same call."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * mask[:, :, None].contiguous()

    example = torch.randn(2, 6, 4), cut(6)
    net = Masked()
    model = lora_fx.insert(net, example, rank=2)
    assert execution_of(model).captured.named["mask"].is_contiguous()
    x, mask = torch.randn(3, 9, 4), torch.ones(3, 9, dtype=example[1].dtype)
    assert torch.equal(model(x, mask), net(x, mask))
    turned = torch.randn(4, 6, 2).permute(2, 1, 0)  # dense in another order: that stays
    assert lora_fx.capture(net, (turned, cut(6))).named["x"].stride() == turned.stride()
