"""Updates of one use: uses that a model lacks, files that name a module, live models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from tests.passes.test_uses import Tied, adapted, built, out


def test_a_use_that_the_model_lacks_is_named() -> None:
    cap, x = built("Tied")
    adapter = lora_fx.insert(cap, rank=2, include="role:head").adapter()

    class Bare(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.tanh(self.embed(ids)) @ self.head.weight.t()

    with pytest.raises(LoraFxError, match=r"its use 'head\.weight', but the model has no such use"):
        lora_fx.insert(Bare(), (x,), adapter=adapter)


def test_a_file_that_names_one_module_of_a_shared_tensor(tmp_path: Path) -> None:
    cap, _ = built("Shared")
    a, b = draw("w", lora_fx.find(cap).targets[0].layout, 2, 0, "probe")
    bound = Adapter({"b.weight": lora_fx.LowRank(a, b, 1.0)}).bind(cap)
    assert {k: u.use for k, u in bound.lowrank.items()} == {"a.weight@b.weight": "b.weight"}
    whole = lora_fx.insert(cap, rank=2, include="*").adapter()
    (note, *_) = lora_fx.save_adapter(whole, tmp_path / "adapter")
    assert "several modules that share the tensor" in note


def test_a_live_model_has_them_where_modules_tell_them_apart() -> None:
    cap, x = built("Tied")
    module = adapted(cap)
    want = out(module, x)
    model = lora_fx.attach(cap, adapter=module.adapter())
    assert rel(out(model, x), want) < 2e-6
    assert list(model.adapter()) == list(module.updates)
    lora_fx.detach(model)
    cap, _ = built("Repeated")
    with pytest.raises(LoraFxError, match=r"layer\.forward has uses with it and uses without it"):
        lora_fx.attach(cap, rank=2, include="*@*")
    assert not hasattr(cap.model, "adapter")
