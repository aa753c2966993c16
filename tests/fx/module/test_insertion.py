"""What lora-fx asks of a module that it returned stands beside it, and not among its members."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of

INTERNAL = (
    "base_dtype", "captured", "changes_anything", "check_base", "effect", "flat", "found",
    "inserting", "norm_stats", "not_one", "sample", "say", "slots",
)  # fmt: skip
X = torch.randn(3, 6)


class Named(nn.Module):
    """A model whose layers have names that lora-fx needs for itself elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        for name in INTERNAL:
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in INTERNAL:
            layer = getattr(self, name)
            x = torch.tanh(layer(x))
        return x


def test_internal_members_are_no_attributes() -> None:
    module = lora_fx.insert(nn.Sequential(nn.Linear(6, 4)), (X,), rank=2)
    folded = lora_fx.fold(module)
    for name in INTERNAL:
        assert not hasattr(module, name), name
        assert not hasattr(folded, name), name


def test_a_model_may_have_layers_of_these_names() -> None:
    model = Named().eval()
    module = lora_fx.insert(model, (X,), rank=2)
    assert set(module.updates) == {f"{name}.weight" for name in INTERNAL}
    torch.testing.assert_close(module.eval()(X), model(X))
    assert list(module.report().effect.dead) == []
    for _, b in insertion_of(module).slots().values():
        b.data.normal_(std=0.1)
    folded = lora_fx.fold(module)
    torch.testing.assert_close(folded(X), module(X))
    copied = copy.deepcopy(module)
    torch.testing.assert_close(copied(X), module(X))
    assert (copied(X) - model(X)).abs().max() > 1e-3


def test_an_insertion_is_that_of_the_module_now() -> None:
    module = lora_fx.insert(nn.Sequential(nn.Linear(6, 4)), (X,), rank=2)
    insertion = insertion_of(module)
    assert insertion.found["0.weight"].layout.stored == (4, 6)
    assert insertion.also_train == () and not insertion.changes_anything()
    a, b = insertion.slots()["0.weight"]
    tensors = module.tensors()["0.weight"]
    assert a is tensors["a"] and b is tensors["b"]
    with torch.no_grad():
        b.fill_(1.0)
    assert insertion_of(module).changes_anything()
    insertion.say("first", "second", "first")
    assert module.notes[-2:] == ("first", "second")
    assert module.report().effect is insertion.effect
    insertion.check_base(Adapter({}))


def test_the_dtype_of_an_execution_follows_the_module() -> None:
    module = lora_fx.insert(nn.Sequential(nn.Linear(6, 4)), (X,), rank=2)
    execution = execution_of(module)
    assert execution.base_dtype is torch.float32 and execution.norm_stats == "frozen"
    module.to(torch.bfloat16)
    assert execution.base_dtype is torch.bfloat16
    drawn: dict[str, Any] = execution.sample((2, 5))
    assert drawn["input"].dtype is torch.bfloat16 and drawn["input"].shape == (2, 6)
    assert set(execution.flat(drawn)) == {"output"}


@pytest.mark.parametrize("name", ["scale", "adapter", "updates"])
def test_a_public_name_is_still_taken(name: str) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, nn.Linear(6, 6))

        def forward(self, x: torch.Tensor) -> Any:
            return getattr(self, name)(x)

    with pytest.raises(
        lora_fx.LoraFxError,
        match=f"{name} holds weights, but the module that insert returns uses the name",
    ):
        lora_fx.insert(Holder().eval(), (X,), rank=2)
