"""A live model is as it was, whatever its own code changes when it runs.

On 1358f462 attach left each of these changed: it runs the model on small inputs of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx

SHORT = 6
"""Inputs of fewer rows make the models change; those of proofs are, and the example is not."""


class Changing(nn.Module):
    """A model that changes itself when its input is short."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.act: nn.Module = nn.Tanh()
        self.kind = "block"
        self.factor, self.runs, self.sizes = 1.0, 0, (1, 2)
        self.limit: int | None = None
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < SHORT:
            self.change(self)
        y = self.act(self.first(x)) * self.factor
        if self.kind == "full":
            y = y.flip(-1)
        if self.limit is not None:
            y = y.clamp(max=self.limit)
        result: Tensor = self.last(y) * self.sizes[0]
        return result


def _name(m: Any) -> None:
    m.kind = "full"


def _child(m: Any) -> None:
    m.act = nn.ReLU()


def _number(m: Any) -> None:
    m.factor = 3.0


def _none(m: Any) -> None:
    m.limit = 0


def _tuple(m: Any) -> None:
    m.sizes = (5, 2)


def _counter(m: Any) -> None:
    m.runs += 1


CHANGES = {f.__name__[1:]: f for f in (_name, _child, _number, _none, _tuple, _counter)}


def attributes(model: nn.Module) -> dict[str, Any]:
    """What a run may change of a model, by name."""
    plain = (str, float, int, tuple, type(None))
    found = {n: v for n, v in vars(model).items() if isinstance(v, plain)}
    return found | {n: type(m) for n, m in model.named_modules()}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_changes_itself_is_put_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Changing(CHANGES[name]).eval(), torch.randn(2, 9, 8)
    was, expected = attributes(model), model(x).detach()
    lora_fx.find(model, (x,))
    lora_fx.insert(model, (x,), rank=2)
    lora_fx.attach(model, (x,), rank=2)
    lora_fx.detach(model)
    assert attributes(model) == was
    assert torch.equal(model(x), expected)
    lora_fx.export(model, tmp_path / "m.onnx", (x,), provider="cpu")
    assert attributes(model) == was
