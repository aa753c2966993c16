"""Variants and starts in the module that insert returns: trained, saved, loaded by PEFT, folded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.starts import INITS, OF_DATA
from lora_fx.adapter.variant import VARIANTS
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program
from tests.zoo.shared import captured

FREE = [i for i in INITS if i not in OF_DATA]
# PEFT ignores QA-LoRA beside floats: tests/passes/verbs/test_qalora.py and tests/formats/peft
COMBINATIONS = [(v, "kaiming") for v in VARIANTS if v != "qalora"] + [
    ("lora", i) for i in FREE if i != "kaiming"
]
COMBINATIONS += [("dora", "pissa"), ("rslora", "olora")]
TRAINED = {
    "dora": {"a", "b", "magnitude"},
    "lora-fa": {"b"},
    "loha": {"hada_a1", "hada_b1", "hada_a2", "hada_b2"},
    "vera": {"lambda_d", "lambda_b"},
}
"""Variant → the tensors that training moves, where those are not a and b."""
SOME = [("dora", "pissa"), ("rslora", "olora"), ("lora-fa", "kaiming"), ("lora+", "kaiming")]
"""Every variant, a frozen half, and none."""


class Net(nn.Module):
    """A convolution, a linear and a head; rectangular."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.up = nn.Linear(6, 10)
        self.out = nn.Linear(10, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        out: torch.Tensor = self.out(torch.tanh(self.up(x)))
        return out


def model() -> Net:
    torch.manual_seed(3)
    return Net().eval()


X = torch.randn(4, 3, 8, 7, generator=torch.Generator().manual_seed(1))


def shared() -> Captured:
    return captured("variants net", lambda: (model(), (X,)))[0]


def hashed(module: nn.Module, names: list[str]) -> str:
    digest = hashlib.sha256()
    tensors = dict(module.named_parameters())
    for name in names:
        digest.update(tensors[name].detach().numpy().tobytes())
    return digest.hexdigest()


def steps(module: AdaptedModule, n: int = 3, lr: float = 0.02) -> AdaptedModule:
    """A few steps of Adam, so that every trained tensor has moved."""
    optimizer = torch.optim.AdamW(module.parameter_groups(lr))
    module.train()
    y = torch.arange(len(X)) % 5
    for _ in range(n):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X), y).backward()
        optimizer.step()
    return module.eval()


def of(module: nn.Module) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.asarray(module(X).numpy())


@pytest.mark.parametrize(("variant", "init"), COMBINATIONS)
def test_training_leaves_the_base_alone_and_folds(variant: str, init: str, tmp_path: Path) -> None:
    cap = shared()
    own = cap.model
    names = [n for n, _ in own.named_parameters()]
    before = hashed(own, names)
    module = lora_fx.insert(cap, rank=2, include="conv,up,out", variant=variant, init=init, seed=4)
    assert (
        rel(of(module), of(own)) < 1e-6 and not insertion_of(module).changes_anything()
    ) or init == "orthogonal"
    held = module.tensors()
    start = {(k, f): p.detach().clone() for k, h in held.items() for f, p in h.items()}
    steps(module, lr=0.1 if variant == "vera" else 0.02)
    moved = {f for (k, f), p in start.items() if not torch.equal(p, held[k][f])}
    assert moved == TRAINED.get(variant, {"a", "b"})
    assert hashed(own, names) == hashed(module, names) == before
    assert insertion_of(module).changes_anything()
    branched = of(module)
    assert rel(branched, of(own)) > 0.02
    folded = lora_fx.fold(module)
    assert rel(of(folded), branched) < 5e-6

    lora_fx.save_adapter(module.adapter(), tmp_path / "adapter")
    if variant != "vera":  # PEFT has none for convolutions; see tests/adapter/test_loha_vera.py
        read = peft.PeftModel.from_pretrained(model(), str(tmp_path / "adapter")).eval()
        assert rel(of(read), branched) < 1e-5
    again = lora_fx.insert(shared(), adapter=lora_fx.load_adapter(tmp_path / "adapter"))
    assert rel(of(again), branched) < 1e-6
    assert _trained(again) == _trained(module), "what trains is known again"
    other = lora_fx.insert(shared(), rank=1)
    other.load_adapter(module.adapter())
    assert rel(of(other), branched) < 1e-6 and _trained(other) == _trained(module)


def _trained(module: AdaptedModule) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("variant", "init"), SOME)
def test_a_program_file_keeps_variants(variant: str, init: str, tmp_path: Path) -> None:
    module = steps(lora_fx.insert(shared(), rank=2, variant=variant, init=init))
    save_program(module, tmp_path / "x.pt2")
    again = load_program(tmp_path / "x.pt2")
    assert isinstance(again, AdaptedModule)
    np.testing.assert_array_equal(of(again.eval()), of(module))
    assert _trained(again) == _trained(module)
    one, two = module.adapter(), again.adapter()
    for key, low in one.lowrank.items():
        other = two.lowrank[key]
        assert (low.frozen, low.variant, low.alpha) == (other.frozen, other.variant, other.alpha)
        for field in ("a", "b", "magnitude"):
            np.testing.assert_array_equal(getattr(low, field), getattr(other, field))


def test_how_tensors_lie_in_memory_is_no_difference(tmp_path: Path) -> None:
    """A product of a matrix that is stored column by column may be summed up in another order."""
    module = steps(lora_fx.insert(shared(), rank=2, variant="dora", init="pissa"))
    assert all(p.is_contiguous() for p in module.parameters()), "factors of an SVD are turned"
    for p in module.parameters():
        p.data = p.data.mT.contiguous().mT if p.dim() > 1 else p.data
    save_program(module, tmp_path / "x.pt2")
    again = load_program(tmp_path / "x.pt2").eval()
    assert rel(of(again), of(module)) < 1e-6


@pytest.mark.parametrize(("variant", "init"), SOME)
def test_attach_is_insert(variant: str, init: str) -> None:
    module = steps(lora_fx.insert(shared(), rank=2, variant=variant, init=init))
    live = lora_fx.attach(shared(), rank=2, variant=variant, init=init)
    assert {n: tuple(p.shape) for n, p in live.named_parameters() if p.requires_grad} == {
        n: s for n, s in _trained(module).items()
    }
    live.load_adapter(module.adapter())
    assert rel(of(live), of(module)) < 1e-6
    lora_fx.detach(live)
    assert {n for n, _ in live.named_parameters()} == {n for n, _ in model().named_parameters()}


def test_dora_learns_as_in_peft() -> None:
    """Same A, same batches, no dropout: losses equal step by step; the norm is a constant."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["conv", "up", "out"], use_dora=True)
    theirs = peft.get_peft_model(model(), config)
    ours = lora_fx.insert(shared(), rank=2, include="conv,up,out", variant="dora")
    first = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, (a, _) in insertion_of(ours).slots().items():
            p = first[f"base_model.model.{key.removesuffix('.weight')}.lora_A.default.weight"]
            p.copy_(a.reshape(p.shape))
    y = torch.arange(len(X)) % 5
    losses: list[list[float]] = [[], []]
    trained = [[p for p in theirs.parameters() if p.requires_grad], list(ours.parameters())]
    for n, (m, params) in enumerate(zip((theirs, ours), trained, strict=True)):
        optimizer = torch.optim.AdamW([p for p in params if p.requires_grad], lr=0.02)
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(m.train()(X), y)
            loss.backward()
            optimizer.step()
            losses[n].append(float(loss.detach()))
    assert losses[0][-1] < losses[0][0] * 0.9
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_are_those_of_peft(init: str) -> None:
    """PEFT takes the part off W; here a frozen half does. The products are the same."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["up"], init_lora_weights=init)
    theirs = peft.get_peft_model(model(), config)
    layer: Any = theirs.base_model.model.up
    (a, b), scale = (layer.lora_A.default.weight, layer.lora_B.default.weight), 3.0
    ours = lora_fx.insert(shared(), rank=2, alpha=6, include="up", init=init)
    a1, b1 = insertion_of(ours).slots()["up.weight"]
    product = (scale * (b @ a)).detach().numpy()
    np.testing.assert_allclose((scale * (b1 @ a1)).detach().numpy(), product, atol=1e-5)
    balance = a.norm() / b.norm()
    torch.testing.assert_close(a1.norm() / b1.norm(), balance, rtol=1e-4, atol=0)


def test_lora_plus_learns_faster_by_b() -> None:
    module = lora_fx.insert(shared(), rank=2, variant="lora+", also_train="out.weight")
    rates = {id(p): g["lr"] for g in module.parameter_groups(1e-3, 0.1) for p in g["params"]}
    for a, b in insertion_of(module).slots().values():
        assert (rates[id(a)], rates[id(b)]) == (1e-3, 16e-3)
    assert rates[id(module.get_parameter("out.weight"))] == 1e-3
    assert len(rates) == sum(p.requires_grad for p in module.parameters())
    plain = lora_fx.insert(shared(), rank=2).parameter_groups(1e-3, 0.1)
    assert [(g["lr"], g["weight_decay"]) for g in plain] == [(1e-3, 0.1)]


def test_trained_dora_goes_into_files_that_switch(tmp_path: Path) -> None:
    module = steps(lora_fx.insert(shared(), rank=2, variant="dora"))
    adapters = {"a": module.adapter()}
    for mode in ("switch", "load", "batch", "merged"):
        given = None if mode == "merged" else adapters
        path = tmp_path / mode / "x.onnx"
        path.parent.mkdir()
        assert lora_fx.export(module, path, adapters=given, mode=mode)


def test_truncate_brings_the_rank_back() -> None:
    module = steps(lora_fx.insert(shared(), rank=2, include="up", init="pissa"))
    adapter = module.adapter()
    assert adapter.lowrank["up.weight"].rank == 4
    cut = lora_fx.truncate(adapter, params=2 * 16)  # rank 2 of 10 × 6
    new = lora_fx.insert(shared(), adapter=cut)
    assert [(u.rank, u.frozen) for u in new.updates.values()] == [(2, 0)]
    assert rel(of(new), of(module)) < 0.5 * rel(of(model()), of(module))


def test_options_that_are_refused() -> None:
    with pytest.raises(LoraFxError, match="unknown variant 'lokr'"):
        lora_fx.insert(shared(), variant="lokr")
    with pytest.raises(LoraFxError, match="unknown init 'svd'"):
        lora_fx.attach(shared(), init="svd")
    with pytest.raises(LoraFxError, match="starts from data"):
        lora_fx.insert(shared(), init="eva")
    module = lora_fx.insert(shared(), rank=2, variant="dora", dropout=0.1)
    assert any("acts on branches" in n for n in module.report().notes)
