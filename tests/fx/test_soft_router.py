"""The router of a model that weighs all of its experts, without a choice among them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_fx import find


class AllExperts(nn.Module):
    """Experts whose results are weighed by sigmoids."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.sigmoid(self.router(x))
        return shares[..., :1] * self.experts[0](x) + shares[..., 1:] * self.experts[1](x)


def test_a_router_without_a_choice_is_a_router() -> None:
    router = find(AllExperts(), (torch.randn(3, 8),))["router.weight"]
    assert (router.role, router.default) == ("router", False)
