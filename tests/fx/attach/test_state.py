"""What an attached model holds: the adapter, norms in train mode, names; and what is refused."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.fx.attach.attachment import attachment
from tests.fx.attach.attached import adapter_gap, explicit, gap, randomise, state, train, wide
from tests.zoo.shared import captured


def test_refusals() -> None:
    x = torch.randn(2, 4)
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(lora_fx.LoraFxError, match="adapts a live"):
        lora_fx.attach(lambda x: model(x), (x,))
    with pytest.raises(lora_fx.LoraFxError, match="captured graph already"):
        lora_fx.attach(lora_fx.insert(model, (x,), rank=2), (x,))
    with pytest.raises(lora_fx.LoraFxError, match="unknown variant 'boft'"):
        lora_fx.attach(model, (x,), variant="boft")
    lora_fx.attach(model, (x,), rank=2)
    for verb in (lora_fx.attach, lora_fx.insert, lora_fx.find):
        with pytest.raises(lora_fx.LoraFxError, match="an adapter is attached to this"):
            verb(model, (x,))
    model[0].__class__ = type("Other", (type(model[0]),), {})
    with pytest.raises(lora_fx.LoraFxError, match="into a Other after attach"):
        lora_fx.detach(model)


def test_load_adapter_and_base() -> None:
    cap, _, kwargs = captured("hf_bert/1")
    inserted = lora_fx.insert(captured("hf_bert/1")[0], rank=3, also_train="classifier")
    randomise(inserted)
    with torch.no_grad():
        inserted.classifier.weight.add_(1.0)
    base = cap.model(**kwargs)
    model = lora_fx.attach(cap, rank=1, also_train="classifier")
    assert gap(model(**kwargs), base) == 0.0
    model.load_adapter(inserted.adapter())
    assert gap(model(**kwargs), inserted(**kwargs)) < 1e-6
    assert adapter_gap(model.adapter(), inserted.adapter()) == 0.0
    other = lora_fx.attach(captured("hf_bert/1")[0], adapter=inserted.adapter())
    assert gap(other(**kwargs), inserted(**kwargs)) < 1e-6
    lora_fx.detach(other)
    assert gap(other(**kwargs), base) == 0.0
    text = str(model.report())
    assert "classifier.weight: trained whole" in text and "rank 3" in text
    held = attachment(model).slots()
    turned = dict(reversed(inserted.adapter().lowrank.items()))  # a file has an order of its own
    model.load_adapter(lora_fx.Adapter(turned))
    assert all(attachment(model).slots()[k][0] is a for k, (a, _) in held.items()), "same objects"
    assert (
        adapter_gap(
            lora_fx.Adapter(model.adapter().lowrank), lora_fx.Adapter(inserted.adapter().lowrank)
        )
        == 0.0
    )
    wider = lora_fx.insert(captured("hf_bert/1")[0], rank=1, include="*")
    with pytest.raises(lora_fx.LoraFxError, match="was not adapted when"):
        model.load_adapter(wider.adapter())
    with attachment(model).base():
        assert gap(model(**kwargs), base) == 0.0


@pytest.mark.parametrize("stats", ["frozen", "update"])
def test_batch_norms_in_train_mode(stats: str) -> None:
    cap, args, kwargs = captured("tv_resnet18/1")
    inserted = lora_fx.insert(captured("tv_resnet18/1")[0], rank=2, norm_stats=stats).train()
    before = state(cap.model)
    model = lora_fx.attach(cap, rank=2, norm_stats=stats).train()
    first, second = (train(m, args, kwargs, steps=2, lr=1e-4) for m in (inserted, model))
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 1e-5
    moved = [k for k, v in model.state_dict().items() if k in before and not v.equal(before[k])]
    assert bool(moved) == (stats == "update")
    assert all("running_" in k or "num_batches" in k for k in moved)
    assert gap(model.eval()(*args), inserted.eval()(*args)) < 1e-5
    assert lora_fx.detach(model.train()).bn1.training


class Own(nn.Module):
    """Has an attribute and a method of its own by the names of methods that attach adds."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.adapter = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)

    def report(self) -> str:
        return "mine"


def test_names_of_the_models_own() -> None:
    model, x = Own(), torch.randn(2, 4)
    captured = lora_fx.capture(model, (x,))
    assert lora_fx.attach(captured, rank=2) is model
    assert model.adapter is None
    assert list(attachment(model).adapter()) == ["lin.weight"]
    assert "the model has its own 'adapter'" in str(model.report())
    assert lora_fx.detach(model).report() == "mine"


def test_wide_masters_on_a_narrow_base() -> None:
    torch.manual_seed(0)  # the norm of six numbers that are nearly equal magnifies rounding
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 5)).bfloat16()
    x = torch.randn(4, 8).bfloat16()
    lora_fx.attach(model, (x,), rank=2)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    adapter = randomise(model)
    out = model(x)
    assert out.dtype == torch.bfloat16
    want = explicit(lora_fx.detach(copy.deepcopy(model)), adapter, (wide(x),))
    assert gap(out, want) < 0.03


class Masked(nn.Linear):
    """Draws by numpy and by Python in train mode, as SpecAugment does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = np.random.rand() + random.random() if self.training else 1.0
        return super().forward(x) * (1.0 + keep)


def test_no_random_numbers_of_the_users_are_drawn() -> None:
    model, x = Masked(4, 3).eval(), torch.randn(2, 4)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    want = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    lora_fx.attach(model, (x,), rank=2)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == want
    assert model.report().effect.modes == ("eval", "train")


class Normed(nn.Module):
    """Norms in both modes, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.trains, self.rests = nn.BatchNorm1d(5), nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.rests(self.b(torch.tanh(self.trains(self.a(x)))))
        return y


def test_every_mode_comes_back() -> None:
    """What says False while it is frozen was set to True, and is so when it is taken off."""
    model = Normed().train()
    model.rests.eval()
    lora_fx.attach(model, (torch.randn(6, 4),), rank=2)
    assert not model.trains.training
    model(torch.randn(6, 4)).sum().backward()
    lora_fx.detach(model)
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes == {"": True, "a": True, "b": True, "trains": True, "rests": False}
