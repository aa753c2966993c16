"""Detectors and their like: in train mode they ask for targets, which an example does not have."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_fx


class Detector(nn.Module):
    """Asks for targets in train mode, in a way of its own; in eval mode it gives some outputs."""

    def __init__(self, asks: str, gives: str) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.asks, self.gives = asks, gives

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> object:
        if self.training:
            self.ask(targets)
        scores = self.head(self.conv(x).relu().mean((2, 3)))
        if self.gives == "classes":
            return scores.argmax(-1)
        if self.gives == "kept":
            return {"scores": scores, "kept": scores.argmax(-1)}
        return scores

    def ask(self, targets: torch.Tensor | None) -> None:
        if self.asks == "assert":
            assert targets is not None, "targets should not be none when in training mode"
        elif self.asks == "torch":
            torch._assert(targets is not None, "targets should not be none")
        elif targets is None:
            raise ValueError("In training mode, targets should be passed")
        elif self.asks == "index":
            targets[0].sum()


X = torch.rand(2, 3, 9, 9)


@pytest.mark.parametrize("gives", ["scores", "classes", "kept"])
@pytest.mark.parametrize("asks", ["assert", "torch", "raise", "index"])
def test_attach_serves_the_eval_mode_as_insert_does(asks: str, gives: str) -> None:
    model = Detector(asks, gives).eval()
    before = copy.deepcopy(model)
    attached = lora_fx.attach(model, (X,), rank=2)
    notes = attached.report().effect.notes
    assert any("train mode is not proven" in n and "targets" in n for n in notes)
    assert set(attached.adapter().entries) == {"conv.weight", "head.weight"}
    inserted = lora_fx.insert(before, (X,), rank=2)
    assert set(inserted.updates) == set(attached.adapter().entries)


class InPlace(Detector):
    """Its eval mode has no backward pass either."""

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> object:
        if self.training:
            self.ask(targets)
        hidden = self.conv(x).mean((2, 3)).sigmoid()
        scores = self.head(hidden)
        hidden.detach().zero_()
        return scores


@pytest.mark.parametrize("asks", ["assert", "torch", "raise"])
def test_where_no_mode_has_a_backward_both_causes_and_the_way_on_are_told(asks: str) -> None:
    model = InPlace(asks, "scores").eval()
    with pytest.raises(lora_fx.LoraFxError, match="no backward pass of the model runs") as caught:
        lora_fx.attach(model, (X,), rank=2)
    message = caught.value.message
    assert "in eval mode: " in message and "inplace" in message
    assert "in train mode: " in message and "targets" in message
    lora_fx.attach(model, (X,), rank=2, dead="allow")  # as the hint says
