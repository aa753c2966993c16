"""What attach cannot reach and insert can: left out or refused by name, before any comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.passes.proofs import attached


class Scaled(nn.Module):
    """A weight that is computed, in a module that is one op."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape) * 0.5)
        self.g = nn.Parameter(torch.rand(1) + 0.5)

    @property
    def weight(self) -> Any:
        return self.w * self.g

    def forward(self, x: Any) -> Any:
        return F.linear(x, self.weight)


class OfEinsum(Scaled):
    def forward(self, x: Any) -> Any:
        return torch.einsum("bti,oi->bto", x, self.weight)


class Turned(Scaled):
    def forward(self, x: Any) -> Any:
        return torch.einsum("bti,oi->obt", x, self.weight)


class Region(Scaled):
    def forward(self, x: Any) -> Any:
        return F.linear(x, self.weight[:5])


class Convolved(Scaled):
    def forward(self, x: Any) -> Any:
        return F.conv1d(x, self.weight)


class Net(nn.Module):
    """A linear layer, and then one that is given."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), last

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.first(x)))


class Inside(nn.Module):
    """A computed weight amid other ops."""

    def __init__(self, of: Callable[[Any, Any], Any] = F.linear) -> None:
        super().__init__()
        self.w, self.g = nn.Parameter(torch.randn(6, 6) * 0.5), nn.Parameter(torch.rand(6, 1))
        self.of = of

    def forward(self, x: Any) -> Any:
        return torch.relu(self.of(x + 1, self.w * self.g)) + x


class ReadTwice(nn.Module):
    """A layer whose weight another matmul reads, and one more op."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.read = read

    def forward(self, x: Any) -> Any:
        y = F.linear(self.layer(x), self.layer.weight)
        return y + 0.1 * self.read(self.layer.weight)


class OneForward(nn.Module):
    """A table that one forward looks up in and multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1200, 6))
        self.first = nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        h = torch.tanh(self.first(x))
        rows = F.embedding(h.argmax(-1), self.table)
        return (h + rows) @ self.table.t()


class Repeated(nn.Module):
    """A weight that is repeated for every row."""

    def __init__(self, by: Callable[[Any, int], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6) * 0.5)
        self.by = by

    def forward(self, x: Any) -> Any:
        return torch.bmm(torch.relu(x), self.by(self.w, x.shape[0])) + x


def example() -> torch.Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets a number whenever a live model is compared."""
    seen: list[int] = []
    original = attached.prove_live

    def counted(*args: Any) -> None:
        seen.append(1)
        original(*args)

    monkeypatch.setattr(attached, "prove_live", counted)
    return seen


NEEDS_WEIGHT = {
    "linear": lambda: Net(Scaled(8, 6)),
    "einsum": lambda: Net(OfEinsum(8, 6)),
    "turned": lambda: Net(Turned(8, 6)),
    "region": lambda: Net(Region(8, 6)),
    "conv": lambda: Net(Convolved(8, 5, 3)),
}


@pytest.mark.parametrize("name", NEEDS_WEIGHT)
def test_dora_of_a_computed_weight(name: str, compared: list[int]) -> None:
    torch.manual_seed(0)
    model = NEEDS_WEIGHT[name]()
    keys = [*lora_fx.insert(model, (example(),), rank=2, include="*").adapter().entries]
    (key,) = [k for k in keys if k != "first.weight"]
    with pytest.raises(LoraFxError, match=r"computes this weight from last\.g, last\.w") as error:
        lora_fx.attach(model, (example(),), rank=2, include="*", variant="dora")
    assert error.value.message.startswith(f"{key}: ")
    assert not compared
    plain = lora_fx.attach(model, (example(),), rank=2, include="*")
    assert [*plain.adapter().entries] == keys  # as a branch of the module's output
    lora_fx.detach(model)
    lora_fx.attach(model, (example(),), rank=2, variant="dora")
    assert [*model.adapter().entries] == ["first.weight"]


INSIDE = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w.t(),
    "einsum": lambda x, w: torch.einsum("bti,oi->bto", x, w),
    "bmm": lambda x, w: torch.bmm(w.repeat(2, 1, 1), x.mT).mT,
    "normed": lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_computed_weight_amid_other_ops_is_left_out_and_said(
    name: str, compared: list[int]
) -> None:
    torch.manual_seed(0)
    model = Net(Inside(INSIDE[name]))
    adapter = lora_fx.insert(model, (example(),), rank=2).adapter()
    lora_fx.attach(model, (example(),), rank=2)
    assert [*model.adapter().entries] == ["first.weight"]
    left = [k for k in adapter.entries if k != "first.weight"]
    notes = " ".join(model.report().notes)
    for key in left:
        assert key in notes
        with pytest.raises(LoraFxError, match="attach left it out"):
            model.load_adapter(adapter)
    lora_fx.detach(model)
    compared.clear()
    with pytest.raises(LoraFxError, match="no module's forward is this op alone"):
        lora_fx.attach(model, (example(),), adapter=adapter)
    assert not compared


READERS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda w: w.norm(),
    "mean": lambda w: w.mean(),
    "abs": lambda w: w.abs().amax(),
    "square": lambda w: (w * w).sum(),
    "softmax": lambda w: w.softmax(0).amax(),
}


@pytest.mark.parametrize("name", READERS)
def test_a_weight_that_more_than_matmuls_read(name: str, compared: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ReadTwice(READERS[name]), nn.Linear(6, 6))
    for options in ({"include": "*"}, {"include": "*", "dead": "allow"}):
        with pytest.raises(
            LoraFxError, match="the forward of another module also uses it in a matmul"
        ):
            lora_fx.attach(model, (example(),), rank=2, **options)
    assert not compared
    lora_fx.attach(model, (example(),), rank=2)
    assert [*model.adapter().entries] == ["1.weight"]


def test_one_use_of_a_table_in_one_forward_is_left_out(compared: list[int]) -> None:
    torch.manual_seed(0)
    model = OneForward()
    plan = {"table@op:matmul": 2, "first.weight": 2}
    assert [*lora_fx.insert(model, (example(),), plan=plan).adapter().entries] == [*plan]
    with pytest.raises(LoraFxError, match="is for only some uses"):
        lora_fx.attach(model, (example(),), plan=plan)
    assert not compared
    lora_fx.attach(model, (example(),), plan=plan, dead="drop")
    assert [*model.adapter().entries] == ["first.weight"]
    assert "is for only some uses" in " ".join(model.report().notes)


REPEATS: dict[str, Callable[[Any, int], Any]] = {
    "expand": lambda w, n: w.expand(n, -1, -1),
    "repeat": lambda w, n: w.repeat(n, 1, 1),
    "unsqueezed": lambda w, n: w[None].expand(n, -1, -1),
    "turned": lambda w, n: w.t().expand(n, -1, -1),
    "transposed": lambda w, n: w.expand(n, -1, -1).mT,
}


@pytest.mark.parametrize("name", REPEATS)
def test_a_weight_repeated_for_every_row_is_no_target_of_either(name: str) -> None:
    torch.manual_seed(0)
    model = Net(Repeated(REPEATS[name]))
    inserted = lora_fx.insert(model, (example(),), rank=2, include="*")
    lora_fx.attach(model, (example(),), rank=2, include="*")
    assert [*model.adapter().entries] == [*inserted.adapter().entries] == ["first.weight"]


@pytest.mark.parametrize(
    "equation", ["bti,oi->bt", "bti,oi->b", "bti,oi->tb", "bi,oi->b", "i,oi->"]
)
def test_an_einsum_that_sums_over_rows_of_its_weight(equation: str) -> None:
    """It ended in a ValueError."""
    sizes = {"b": 2, "t": 5, "i": 6}
    x = torch.randn([sizes[c] for c in equation.partition(",")[0]])
    found = lora_fx.find(_Einsum(equation), (x,))
    assert [r.key for r in found.refusals] == ["w"]
    assert "the weight has no input axis or no output axis" in str(found)


class _Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 6))
        self.equation = equation

    def forward(self, x: Any) -> Any:
        return torch.einsum(self.equation, x, self.w)


@pytest.mark.parametrize("verb", [lora_fx.insert, lora_fx.attach], ids=["insert", "attach"])
def test_in_inference_mode(verb: Callable[..., Any]) -> None:
    """A and B are made outside of it; weights that were made inside it can train nothing."""
    model = Net(nn.Linear(6, 4))
    with torch.inference_mode():
        adapted = verb(model, (example(),), rank=2)
        made_inside = Net(nn.Linear(6, 4))
        with pytest.raises(LoraFxError, match=r"made in torch\.inference_mode: first\.weight"):
            verb(made_inside, (example(),), rank=2)
    with pytest.raises(LoraFxError, match=r"made in torch\.inference_mode"):
        verb(made_inside, (example(),), rank=2)
    adapted.train()(example()).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.parameters())
