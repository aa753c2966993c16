"""One update per use of a tied, shared or repeated tensor; every oracle is a model in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import FOLD_TOL, ORT_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.passes.find import find
from lora_fx.passes.insert import Insert
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program
from tests.zoo.shared import captured

Deltas = dict[str, Tensor]


class Tied(nn.Module):
    """A lookup and a head with one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))

    def changed(self, ids: Tensor, d: Deltas) -> Tensor:
        w = self.embed.weight
        h = torch.tanh(F.embedding(ids, w + d["embed.weight@embed.weight"]))
        return F.linear(h, w + d["embed.weight@head.weight"])


class Shared(nn.Module):
    """Two linear layers with one tensor, one of them called twice, and a product beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.tanh(self.b(torch.tanh(self.a(x))))))
        return x @ self.a.weight

    def changed(self, x: Tensor, d: Deltas) -> Tensor:
        w, b = self.a.weight, self.a.bias
        h = torch.tanh(F.linear(x, w + d["a.weight@a.weight"], b))
        h = torch.tanh(F.linear(h, w + d["a.weight@call:1"]))
        h = torch.tanh(F.linear(h, w + d["a.weight@call:2"]))
        return h @ (w + d["a.weight@op:matmul"])


class Repeated(nn.Module):
    """One layer, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.out(x)

    def changed(self, x: Tensor, d: Deltas) -> Tensor:
        for i in range(3):
            w = self.layer.weight + d[f"layer.weight@call:{i}"]
            x = torch.tanh(F.linear(x, w, self.layer.bias))
        return F.linear(x, self.out.weight + d["out.weight"], self.out.bias)


class Stacked(nn.Module):
    """Parts of one tensor, each used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.w[:6], self.w[6:]
        x = torch.tanh(F.linear(torch.tanh(F.linear(x, first)), first))
        return F.linear(x, last) + F.linear(x.flip(-1), last)

    def changed(self, x: Tensor, d: Deltas) -> Tensor:
        first, last = self.w[:6], self.w[6:]
        h = torch.tanh(F.linear(x, first + d["w@call:0[0:6]"]))
        h = torch.tanh(F.linear(h, first + d["w@call:1[0:6]"]))
        one, two = (last + d[f"w@call:{i}[6:10]"] for i in (0, 1))
        return F.linear(h, one) + F.linear(h.flip(-1), two)


MODELS: dict[str, Callable[[], Any]] = {c.__name__: c for c in (Tied, Shared, Repeated, Stacked)}


def drawn(name: str) -> tuple[Any, tuple[Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, p.shape[-1] ** -0.5)
    return model, (torch.randint(0, 11, (2, 5)) if name == "Tied" else torch.randn(3, 6),)


def built(name: str) -> tuple[Captured, Tensor]:
    cap, (x,), _ = captured(f"uses {name}", lambda: drawn(name))
    return cap, x


def adapted(cap: Captured, include: str = "*@*") -> Any:
    """A module with an update of its own, unlike all others, at every use."""
    module = lora_fx.insert(cap, rank=2, include=include)
    updates = {}
    for key, u in module.updates.items():
        a, b = draw(key, u.layout, u.rank, 0, "probe")
        updates[key] = replace(u, a=a, b=b * np.float32(0.3))
    module.load_adapter(Adapter(updates))
    return module


def explicit(model: Any, x: Tensor, adapter: Adapter) -> np.ndarray[Any, Any]:
    plain = copy.deepcopy(model).double()
    deltas = {k: torch.from_numpy(d) for k, d in adapter.deltas().items()}
    with torch.no_grad():
        return np.asarray(plain.changed(x if x.dtype == torch.int64 else x.double(), deltas))


def out(module: Any, x: Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.asarray(module(x))


@pytest.mark.parametrize("name", MODELS)
def test_every_use_has_its_own(name: str, tmp_path: Path) -> None:
    cap, x = built(name)
    zero = lora_fx.insert(cap, rank=2, include="*@*")
    np.testing.assert_array_equal(out(zero, x), out(cap.model, x))
    module = adapted(cap)
    adapter = module.adapter()
    want = explicit(cap.model, x, adapter)
    assert 0.05 < rel(want, out(cap.model, x)) < 5
    folded = lora_fx.fold(module)
    assert rel(out(module, x), want) < ORT_TOL
    assert rel(out(folded, x), want) < ORT_TOL
    assert rel(out(folded, x), out(module, x)) < FOLD_TOL
    assert all(f.keys for f in folded.folded)
    with module.base():
        np.testing.assert_array_equal(out(module, x), out(cap.model, x))
    lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert rel(got, want) < ORT_TOL


@pytest.mark.parametrize("name", MODELS)
def test_two_updates_that_change_places_are_seen(name: str) -> None:
    cap, x = built(name)
    module = adapted(cap)
    adapter = module.adapter()
    want = explicit(cap.model, x, adapter)
    first, second = list(adapter)[:2]
    one, two = adapter.lowrank[first], adapter.lowrank[second]
    swapped = {**adapter.lowrank, first: replace(one, b=two.b, a=two.a)}
    module.load_adapter(Adapter({**swapped, second: replace(two, b=one.b, a=one.a)}))
    assert rel(out(module, x), want) > 1e-3
    assert rel(out(lora_fx.fold(module), x), want) > 1e-3


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_files_keep_them_apart(name: str, suffix: str, tmp_path: Path) -> None:
    cap, x = built(name)
    module = adapted(cap)
    lora_fx.save_adapter(module.adapter(), tmp_path / f"adapter{suffix}")
    loaded = lora_fx.load_adapter(tmp_path / f"adapter{suffix}")
    assert sorted(loaded) == sorted(module.updates)
    again = lora_fx.insert(cap, adapter=loaded)
    np.testing.assert_array_equal(out(again, x), out(module, x))
    np.testing.assert_array_equal(
        out(lora_fx.fold(cap, adapter=loaded), x), out(lora_fx.fold(module), x)
    )


@pytest.mark.parametrize("name", ["Tied", "Shared"])
def test_a_program_file_keeps_them_apart(name: str, tmp_path: Path) -> None:
    cap, x = built(name)
    module = adapted(cap)
    save_program(module, tmp_path / "m.pt2")
    loaded = load_program(tmp_path / "m.pt2")
    assert list(loaded.updates) == list(module.updates)
    np.testing.assert_array_equal(out(loaded, x), out(module, x))


def test_training_moves_every_one_of_them() -> None:
    cap, x = built("Repeated")
    module = lora_fx.insert(cap, rank=2, include="layer@*").train()
    assert list(module.updates) == [f"layer.weight@call:{i}" for i in range(3)]
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module(x).square().sum().backward()
    optimizer.step()
    moved = [u.b for u in module.adapter().lowrank.values()]
    assert all(b.any() for b in moved)
    assert not np.array_equal(moved[0], moved[1])


def test_the_weight_form_is_the_same() -> None:
    cap, x = built("Shared")
    module = adapted(cap)
    graph = cap.fx_graph(root=copy.deepcopy(cap.model))
    updates = module.adapter().lowrank
    Insert(updates, weight_form=True)(graph)
    with torch.no_grad():
        (got,) = torch.fx.GraphModule(graph.root, graph.graph)(x)
    assert rel(got.numpy(), out(module, x)) < FOLD_TOL
    assert not Insert(updates)(graph).modified


def test_selectors_and_plans() -> None:
    cap, _ = built("Shared")

    def keys(**options: Any) -> list[str]:
        rank = {} if "plan" in options else {"rank": 1}
        module = lora_fx.insert(cap, **{**rank, **options})
        return [k.removeprefix("a.weight") for k in module.updates]

    every = ["@a.weight", "@call:1", "@call:2", "@op:matmul"]
    assert keys(include="*@*") == keys(include="*,b@*") == keys(include="class:Linear@*") == every
    assert keys(include="*") == [""]
    assert keys(include="a@b") == ["@b.weight"]
    assert keys(include="a@op:*") == ["@op:matmul"]
    assert keys(include="a@call:*") == ["@call:1", "@call:2"]
    assert keys(include="a@*", exclude="a@call:*") == ["@a.weight", "@op:matmul"]
    assert keys(include="a", exclude="a@b") == ["@a.weight", "@op:matmul"]
    assert keys(plan={"a.weight@a.weight": 2, "b.weight@call:1": 1}) == ["@a.weight", "@call:1"]
    ranks = lora_fx.insert(cap, plan={"a.weight@b.weight": 2, "a.weight@a.weight": 1})
    assert [u.rank for u in ranks.updates.values()] == [2, 1]
    for wrong, options in {
        "share elements": {"include": "*,a@call:1"},
        "share elements ": {"plan": {"a.weight@b.weight": 1, "a.weight@call:1": 1}},
        "matches no target": {"include": "a@call:9"},
        "which is not a target": {"plan": {"a.weight@c.weight": 1}},
    }.items():
        with pytest.raises(LoraFxError, match=wrong.strip()):
            keys(**options)


def test_an_adapter_whose_uses_overlap_is_refused() -> None:
    cap, _ = built("Shared")
    low = adapted(cap).adapter().lowrank
    one = low["a.weight@call:1"]
    for keys in (("a.weight", "a.weight@call:1"), ("a.weight@call:1", "a.weight@b.weight")):
        with pytest.raises(LoraFxError, match="share elements"):
            lora_fx.fold(cap, adapter=Adapter(dict.fromkeys(keys, replace(one, use=""))))


def test_a_file_that_names_both_modules_of_a_tensor() -> None:
    """As other tools write it: unbound, by module."""
    for name, first, second in (("Tied", "embed.weight", "head.weight"), ("Shared", "a", "b")):
        cap, x = built(name)
        own = find(cap.fx_graph()).targets[0].layout
        a, b = draw("w", own, 2, 0, "probe")
        given = [k if "." in k else f"{k}.weight" for k in (first, second)]
        entries: dict[str, Any] = {given[0]: {"a": a, "b": b}, given[1]: {"a": -a, "b": b}}
        if name == "Tied":  # a lookup's in is the rows
            entries[given[0]] = {"a": b.T, "b": a.T, "origin": lora_fx.Origin(op="embedding")}
        adapter = Adapter({k: lora_fx.LowRank(alpha=1.0, **e) for k, e in entries.items()})
        bound = adapter.bind(cap)
        assert list(bound) == [f"{given[0]}@{g}" for g in given]
        deltas = list(bound.deltas().values())
        np.testing.assert_array_equal(deltas[0], -deltas[1])
        module = lora_fx.insert(cap, adapter=adapter)
        parity = [rel(out(lora_fx.fold(module), x), out(module, x))]
        assert max(parity) < FOLD_TOL
