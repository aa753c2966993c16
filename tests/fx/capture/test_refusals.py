"""What insert and capture refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import CaptureError, LoraFxError
from tests.fx.module.test_module import Net, net

__all__ = ["net"]


def test_what_cannot_be_captured_names_the_line() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:  # this line
                return x
            out: torch.Tensor = self.fc(x)
            return out

    with pytest.raises(CaptureError) as info:
        lora_fx.find(Branch(), (torch.randn(3, 6),))
    assert "test_refusals.py" in info.value.message and "if x.sum() > 0" in info.value.message
    assert "depends on a tensor's value" in info.value.message
    assert "torch.where" in info.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0 is not a positive"),
        ({"rank": 99}, "rank 99 is larger than the smaller side of every target; the largest is 6"),
        ({"include": "blokcs"}, "selector 'blokcs' matches no target"),
        ({"include": "class:Conv2d"}, "selector 'class:Conv2d' matches no target"),
        ({"exclude": "*"}, "no target is left"),
        ({"also_train": "haed"}, "also_train 'haed' matches no parameter"),
        ({"variant": "nope"}, "unknown variant 'nope'"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_wrong_options(net: Net, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraFxError) as info:
        lora_fx.insert(net, (torch.randn(3, 6),), **options)
    assert message in info.value.message
    assert info.value.hint and info.value.exit_code == 2


def test_wrong_inputs_and_adapters(net: Net) -> None:
    x = torch.randn(3, 6)
    with pytest.raises(LoraFxError, match="example inputs do not fit"):
        lora_fx.find(net, (x, x, x))
    with pytest.raises(CaptureError, match="cannot capture Net"):
        lora_fx.find(net, (torch.randn(3, 5),))
    with pytest.raises(LoraFxError, match="no weight matmul"):
        lora_fx.insert(nn.ReLU(), (x,))
    with pytest.raises(LoraFxError, match="no example input is a tensor"):
        lora_fx.find(nn.ReLU(), (1,))
    other = lora_fx.insert(nn.Sequential(nn.Linear(6, 3)), (x,), rank=2).adapter()
    with pytest.raises(LoraFxError, match=r"adapter key '0.weight' is not a target"):
        lora_fx.insert(net, (x,), adapter=other)
    moved = Adapter({"head.weight": other.entries["0.weight"]})
    with pytest.raises(LoraFxError, match=r"needs A \[2, 6\] and B \[4, 2\]"):
        lora_fx.insert(net, (x,), adapter=moved)


def test_a_capped_rank_is_said(net: Net) -> None:
    m = lora_fx.insert(net, (torch.randn(3, 6),), rank=5)
    assert m.updates["head.weight"].rank == 4
    assert "head.weight: rank 5 capped to 4, its smaller side" in str(m.report())


def test_plan_by_key(net: Net) -> None:
    m = lora_fx.insert(
        net,
        (torch.randn(3, 6),),
        plan={"head.weight": {"rank": 3, "alpha": 1.5}, "blocks.0.0.weight": 1},
    )
    got = {k: (u.rank, u.alpha) for k, u in m.updates.items()}
    assert got == {"head.weight": (3, 1.5), "blocks.0.0.weight": (1, 2.0)}
    with pytest.raises(LoraFxError, match="larger than its smaller side 4"):
        lora_fx.insert(net, (torch.randn(3, 6),), plan={"head.weight": 5})


def test_a_product_of_two_weights_is_refused_by_name() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.a @ self.b)

    found = lora_fx.find(Chain(), (torch.randn(3, 6),))
    assert [(r.key, r.reason) for r in found.refusals] == [
        ("b", "the weight is computed by matmul with another weight from b")
    ]
    (left,) = found.unreached
    assert (left.key, left.reason) == ("a", "no weight matmul uses it; it is read by matmul")


def test_a_weight_under_a_name_that_is_taken_is_named() -> None:
    x = torch.randn(2, 4)

    def named(name: str) -> nn.Module:
        net = nn.Sequential()
        net.add_module(name, nn.Linear(4, 6))
        return net

    assert lora_fx.insert(named("fold"), (x,), rank=2)(x).shape == (2, 6)
    with pytest.raises(lora_fx.LoraFxError, match=r"Sequential\.adapter holds weights"):
        lora_fx.insert(named("adapter"), (x,), rank=2)
    with pytest.raises(
        CaptureError, match=r"torch\.fx itself uses the name of a module .* such as graph"
    ):
        lora_fx.find(named("graph"), (x,))
