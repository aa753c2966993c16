"""A model whose own code raises on the example is refused after one export of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import LoraFxError


class Raising(nn.Module):
    """Does something with the result of a layer."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.fc(x))


class OwnError(Exception):
    pass


def fail(error: Exception) -> Any:
    raise error


ERRORS: dict[str, Callable[[Tensor], Any]] = {
    "an attribute": lambda y: (y,).cache,  # type: ignore[attr-defined]
    "a key": lambda y: {"a": y}["b"],
    "an index": lambda y: [y][1],
    "a value": lambda y: fail(ValueError("no such mode")),
    "an assertion": lambda y: fail(AssertionError("targets are missing")),
    "an error of its own": lambda y: fail(OwnError("mine")),
    "a type": lambda y: len(None),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ERRORS)
def test_one_export_and_one_run(name: str, device: str) -> None:
    calls: list[Tensor] = []  # of all copies; a list of the model's own is put back by a capture

    def then(y: Tensor) -> Any:
        calls.append(y)
        return ERRORS[name](y)

    model = Raising(then).to(device)
    with pytest.raises(LoraFxError, match="cannot capture Raising in eval mode at"):
        lora_fx.find(model, (torch.ones(4, 3),))
    assert len(calls) == 2


TRACED_ALONE: dict[str, Callable[[Tensor], Any]] = {
    "where it is compiled": lambda y: (
        fail(ValueError("not compiled")) if torch.compiler.is_compiling() else y * 2
    ),
    "a value that decides": lambda y: y if y.sum() > -1e9 else -y,
    "a number that is read": lambda y: y * (1 + 0 * y.detach().sum().item()),
}


@pytest.mark.parametrize("name", TRACED_ALONE)
def test_what_an_export_alone_refuses_is_taken_by_another_rung(name: str) -> None:
    model = Raising(TRACED_ALONE[name])
    assert [t.key for t in lora_fx.find(model, (torch.ones(4, 3),)).targets] == ["fc.weight"]
