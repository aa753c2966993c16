"""attach: the numbers of insert on the user's own live module, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.attachment import attachment
from tests.fx.attach.attached import (
    adapter_gap,
    effect,
    explicit,
    gap,
    randomise,
    same_state,
    snapshot,
    state,
    train,
)
from tests.table import ROWS, Model, Row, example
from tests.zoo.models import ZOO
from tests.zoo.shared import captured, zoo

TRAINED = [
    "hf_gpt2",
    pytest.param("hf_llama", marks=pytest.mark.slow),
    pytest.param("tv_vit", marks=pytest.mark.slow),
    "tv_resnet18/1",
    "einsum",
    "f_linear",
    "fused_qkv",
    "mha",
    "transformer_encoder/1",
    "tied_head",
    "bmm_experts",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("tv_resnet18", "transformer_encoder")),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_every_row_is_the_explicit_weight(row: Row) -> None:
    model = Model(row)
    x = example(row)
    changed = effect(model, (x,))
    before = snapshot(model), state(model)
    if row.name == "orthogonal":  # its forward holds the product that makes the weight
        with pytest.raises(lora_fx.LoraFxError, match="the model computes this weight"):
            lora_fx.attach(model, (x,), rank=2, include="*")
        assert snapshot(model) == before[0]
        return
    lora_fx.attach(model, (x,), rank=2, include="*", dead="allow" if row.dead else "error")
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
    inserted = lora_fx.insert(captured(name)[0], rank=2, seed=3).eval()
    cap, args, kwargs = captured(name)
    model = cap.model
    before = state(model)
    attached = lora_fx.attach(cap, rank=2, seed=3).eval()
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
    **{n: partial(zoo, n) for n in ("hf_gpt2/1", "tv_resnet18/1", "transformer_encoder/1")},
    **{n: ZOO[n].build for n in ("mha", "tied_head")},
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
    whole = {"hf_gpt2/1": "ln_f.*", "tv_resnet18/1": "fc"}.get(name)
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
    if (
        include == "*"
    ):  # at the padding row insert's branch trains a, as PEFT's does; W + ΔW would not
        ids = ids.masked_fill(ids == 3, 4)
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
    cap, _, kwargs = captured("hf_gpt2/1")
    inserted = lora_fx.insert(captured("hf_gpt2/1")[0], rank=2, include=include)
    model = lora_fx.attach(cap, rank=2, include=include)
    tensors = [m._parameters["weight"] for m in (model.lm_head, model.transformer.wte)]
    assert tensors[0] is tensors[1]
    randomise(model), randomise(inserted)
    assert gap(model(**kwargs), inserted(**kwargs)) < 1e-6


class Steep(nn.Module):
    """Finite itself; inf − inf with the random updates of the proof."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(40 * self.a(x)) - torch.exp(40 * self.b(x))


def test_a_proof_stays_where_numbers_are_finite() -> None:
    torch.manual_seed(0)
    model: Any = Steep().eval()
    args = (torch.randn(3, 8),)
    lora_fx.attach(model, args, rank=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.copy_(torch.randn(p.shape) * 1e-3)
    adapter = model.adapter()
    want = explicit(lora_fx.detach(copy.deepcopy(model)), adapter, args)
    assert gap(model(*args), want) < 1e-4


class Aliased(nn.Module):
    """Keeps its weight in a plain list: no capture, and no attribute to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.kept = [self.lin.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.linear(x, self.kept[0]))


class Twice(Aliased):
    """Reads its weight as an attribute too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin(x) + F.linear(x.tanh(), self.kept[0]))


class Scaled(Aliased):
    """Reads a number of its weight in Python."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin(x)) * float(self.kept[0].detach().abs().max())


class Both(Aliased):
    """Does something else where two weights are no longer what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.lin.weight, self.head.weight]
        self.was = [w.detach().clone() for w in self.kept]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.lin(x))
        changed = all(not torch.equal(w, was) for w, was in zip(self.kept, self.was, strict=True))
        return -y if changed else y


class Measured(nn.Module):
    """Reads its weight for a norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w / self.w.norm()


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (
            Aliased,
            "lin.weight: the attached model's 'output' .* update does not change the live model",
        ),
        (
            Twice,
            "lin.weight: the attached model's 'output' .* changes the live model in another way",
        ),
        (Scaled, "lin.weight: the attached model's 'output' .* the weight's numbers decide"),
        (Both, "the adapter: the attached model's 'output' .* each update is right by itself"),
        (Measured, "w: read by linalg_vector_norm too"),
    ],
)
def test_a_read_that_attach_cannot_reach_is_an_error(cls: type[nn.Module], why: str) -> None:
    model = cls()
    was = snapshot(model)
    with pytest.raises(lora_fx.LoraFxError, match=rf"^{why}"):
        lora_fx.attach(model, (torch.randn(2, 4),), rank=2)
    assert snapshot(model) == was


def test_a_live_model_far_from_its_codes_is_refused() -> None:
    """The gate of quantised layers is widened by their own rounding, and not without end."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).eval(), torch.randn(3, 6)
    cap = lora_fx.capture(model, (x,))
    cap.quantised = copy.deepcopy(model)
    with torch.no_grad():
        cap.quantised[0].weight.mul_(2)
    with pytest.raises(lora_fx.LoraFxError, match="differs from the reference"):
        lora_fx.attach(cap, rank=2)


@pytest.mark.parametrize("save", [pickle.dumps, lambda m: torch.save(m, io.BytesIO())])
def test_a_pickle_of_the_whole_is_refused_and_the_hint_leads_on(save: Any, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(3, 6)
    attached = lora_fx.attach(model, (x,), rank=2)
    with torch.no_grad():
        for a_and_b in attachment(attached).slots().values():
            a_and_b[1].normal_()
    with pytest.raises(
        LoraFxError, match="with an attached adapter cannot be pickled whole"
    ) as told:
        save(attached)
    assert "save_adapter" in str(told.value.hint) and "detach" in str(told.value.hint)
    copied = copy.deepcopy(attached)
    assert torch.equal(copied(x), attached(x))
    torch.save(attached.state_dict(), tmp_path / "all.pt")
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    again = lora_fx.attach(plain, (x,), rank=2)
    again.load_state_dict(torch.load(tmp_path / "all.pt"))
    assert torch.equal(again(x), attached(x))
    save(lora_fx.detach(attached))
