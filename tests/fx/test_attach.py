"""attach: the numbers of insert on the user's own live module, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.fx.attach import attachment
from tests.fx.attached import (
    adapter_gap,
    effect,
    explicit,
    gap,
    randomise,
    same_state,
    snapshot,
    state,
    train,
    wide,
)
from tests.table import ROWS, Model, Row, example
from tests.zoo.models import ZOO

TRAINED = [
    "hf_gpt2",
    "hf_llama",
    "tv_vit",
    "tv_resnet18",
    "einsum",
    "f_linear",
    "fused_qkv",
    "mha",
    "transformer_encoder",
    "tied_head",
    "bmm_experts",
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_every_row_is_the_explicit_weight(row: Row) -> None:
    model = Model(row)
    x = example(row)
    changed = effect(model, (x,))
    before = snapshot(model), state(model)
    lora_fx.attach(model, (x,), rank=2, include="*")
    adapter = randomise(model)
    assert tuple(adapter) == row.keys
    out = model(x)
    want = explicit(lora_fx.detach(copy.deepcopy(model)), adapter, (x,))
    assert gap(out, want) < 2e-6
    assert changed(out) > 0.02, "a parity test of a no-op proves nothing"
    lora_fx.detach(model)
    assert snapshot(model) == before[0] and same_state(state(model), before[1])


@pytest.mark.parametrize("name", TRAINED)
def test_both_back_ends_train_the_same_adapter(name: str, tmp_path: Path) -> None:
    model, args, kwargs = ZOO[name].build()
    inserted = lora_fx.insert(model, args, kwargs, rank=2, seed=3).eval()
    before = state(model)
    attached = lora_fx.attach(model, args, kwargs, rank=2, seed=3).eval()
    assert attached is model
    assert adapter_gap(attached.adapter(), inserted.adapter()) == 0.0
    assert [k for k in model.state_dict() if "lora_" not in k] == list(before)
    lr = 0.001 if "resnet" in name else 0.05
    first, second = (train(m, args, kwargs, lr=lr) for m in (inserted, attached))
    assert first[0] - first[-1] > 1e-5, "something is learnt"
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 1e-5
    assert adapter_gap(attached.adapter(), inserted.adapter()) < 1e-6
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in inserted.named_parameters() if p.requires_grad
    }
    lora_fx.save_adapter(attached.adapter(), tmp_path / "a")
    inserted.load_adapter(attached.adapter())
    lora_fx.save_adapter(inserted.adapter(), tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert gap(attached(*args, **kwargs), inserted(*args, **kwargs)) < 1e-6


def lstm() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return nn.LSTM(6, 5, num_layers=2, batch_first=True), (torch.randn(2, 4, 6),), {}


BACK: dict[str, Callable[[], Any]] = {
    "lstm": lstm,
    **{n: ZOO[n].build for n in ("hf_gpt2", "tv_resnet18", "transformer_encoder", "mha")},
    "tied_head": ZOO["tied_head"].build,
}


@pytest.mark.parametrize("name", list(BACK))
def test_detach_gives_the_original_back(name: str) -> None:
    model, args, kwargs = BACK[name]()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)  # a flag of the user's own
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    out = model.eval()(*args, **kwargs)
    model.train()
    was = snapshot(model), state(model)
    whole = {"hf_gpt2": "ln_f.*", "tv_resnet18": "fc"}.get(name)
    lora_fx.attach(model, args, kwargs, rank=2, include="*", also_train=whole)
    randomise(model)
    train(model, args, kwargs, steps=2)
    assert gap(model.eval()(*args, **kwargs), out) > 1e-3
    model.train()
    assert lora_fx.detach(model) is model
    assert snapshot(model) == was[0]
    assert same_state(state(model), was[1])
    again = model.eval()(*args, **kwargs)
    assert gap(again, out) == 0.0
    assert calls
    with pytest.raises(lora_fx.LoraFxError, match="no adapter is attached"):
        lora_fx.detach(model)


class Tied(nn.Module):
    """A lookup and a matmul of one tensor: `own` reads both in one forward."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = own
        self.table = nn.Embedding(11, 6, padding_idx=3)
        self.weight = self.table.weight if own else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, self.weight) if self.own else self.table(ids)
        w = self.weight if self.own else self.table.weight
        return torch.tanh(x) @ w.t()


@pytest.mark.parametrize("include", ["op:matmul", "op:embedding", "*"])
def test_one_use_of_a_tied_tensor(include: str) -> None:
    ids = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    model = Tied(own=False)
    inserted = lora_fx.insert(model, (ids,), rank=2, include=include)
    lora_fx.attach(model, (ids,), rank=2, include=include)
    randomise(model), randomise(inserted)
    assert gap(model(ids), inserted(ids)) < 1e-6
    train(model, (ids,)), train(inserted, (ids,))
    assert adapter_gap(model.adapter(), inserted.adapter()) < 1e-6


def test_two_uses_in_one_forward_cannot_be_told_apart() -> None:
    ids = torch.arange(10).reshape(2, 5)
    model = Tied(own=True)
    was = snapshot(model)
    with pytest.raises(lora_fx.LoraFxError, match="only some uses of the tensor") as e:
        lora_fx.attach(model, (ids,), rank=2, include="op:matmul")
    assert "lora_fx.insert" in e.value.hint
    assert snapshot(model) == was
    lora_fx.attach(model, (ids,), rank=2, include="*")


@pytest.mark.parametrize("include", ["lm_head", "wte", "lm_head,wte"])
def test_a_tied_head_of_gpt2(include: str) -> None:
    model, args, kwargs = ZOO["hf_gpt2"].build()
    inserted = lora_fx.insert(model, args, kwargs, rank=2, include=include)
    lora_fx.attach(model, args, kwargs, rank=2, include=include)
    assert model.lm_head.weight is model.transformer.wte.weight
    randomise(model), randomise(inserted)
    assert gap(model(**kwargs), inserted(**kwargs)) < 1e-6


class Aliased(nn.Module):
    """Keeps its weight in a plain list: no capture, and no attribute to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.kept = [self.lin.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.linear(x, self.kept[0]))


class Measured(nn.Module):
    """Reads its weight for a norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w / self.w.norm()


@pytest.mark.parametrize(("cls", "name"), [(Aliased, "lin.weight"), (Measured, "w")])
def test_a_read_that_attach_cannot_reach_is_an_error(cls: type[nn.Module], name: str) -> None:
    model = cls()
    was = snapshot(model)
    with pytest.raises(lora_fx.LoraFxError, match=rf"^{name}: the attached model's 'output'"):
        lora_fx.attach(model, (torch.randn(2, 4),), rank=2)
    assert snapshot(model) == was


def test_refusals() -> None:
    x = torch.randn(2, 4)
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(lora_fx.LoraFxError, match="adapts a live"):
        lora_fx.attach(lambda x: model(x), (x,))
    with pytest.raises(lora_fx.LoraFxError, match="captured graph already"):
        lora_fx.attach(lora_fx.insert(model, (x,), rank=2), (x,))
    with pytest.raises(lora_fx.LoraFxError, match="no variant 'dora'"):
        lora_fx.attach(model, (x,), variant="dora")
    lora_fx.attach(model, (x,), rank=2)
    for verb in (lora_fx.attach, lora_fx.insert, lora_fx.find):
        with pytest.raises(lora_fx.LoraFxError, match="an adapter is attached to this"):
            verb(model, (x,))
    model[0].__class__ = type("Other", (type(model[0]),), {})
    with pytest.raises(lora_fx.LoraFxError, match="became Other by another tool"):
        lora_fx.detach(model)


def test_load_adapter_and_base() -> None:
    model, args, kwargs = ZOO["hf_bert"].build()
    inserted = lora_fx.insert(model, args, kwargs, rank=3, also_train="classifier")
    randomise(inserted)
    with torch.no_grad():
        inserted.classifier.weight.add_(1.0)
    base = model(**kwargs)
    lora_fx.attach(model, args, kwargs, rank=1, also_train="classifier")
    assert gap(model(**kwargs), base) == 0.0
    model.load_adapter(inserted.adapter())
    assert gap(model(**kwargs), inserted(**kwargs)) < 1e-6
    assert adapter_gap(model.adapter(), inserted.adapter()) == 0.0
    other = lora_fx.attach(ZOO["hf_bert"].build()[0], args, kwargs, adapter=inserted.adapter())
    assert gap(other(**kwargs), inserted(**kwargs)) < 1e-6
    lora_fx.detach(other)
    assert gap(other(**kwargs), base) == 0.0
    text = str(model.report())
    assert "classifier.weight: trained whole" in text and "rank 3" in text
    model.load_adapter(lora_fx.Adapter(inserted.adapter().lowrank))
    with attachment(model).base():
        assert gap(model(**kwargs), base) == 0.0


@pytest.mark.parametrize("stats", ["frozen", "update"])
def test_batch_norms_in_train_mode(stats: str) -> None:
    model, args, kwargs = ZOO["tv_resnet18"].build()
    inserted = lora_fx.insert(model, args, kwargs, rank=2, norm_stats=stats).train()
    before = state(model)
    lora_fx.attach(model, args, kwargs, rank=2, norm_stats=stats).train()
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
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 5)).bfloat16()
    x = torch.randn(4, 8).bfloat16()
    lora_fx.attach(model, (x,), rank=2)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    adapter = randomise(model)
    out = model(x)
    assert out.dtype == torch.bfloat16
    want = explicit(lora_fx.detach(copy.deepcopy(model)), adapter, (wide(x),))
    assert gap(out, want) < 0.03
