"""Weights that torch's exporter computes from, joins, or stores for each use: switch and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from lora_fx.onnx import Session  # noqa: E402


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.r = getattr(nn, kind)(4, 6, batch_first=True, **options)
        self.o = nn.Linear(12 if options.get("bidirectional") else 6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.o(self.r(x)[0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.l = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.h = nn.Linear(6, 11, bias=False)
        self.h.weight = self.e.weight

    def forward(self, x: Tensor) -> Any:
        return self.h(torch.tanh(self.l(self.e(x))))


class Attention(nn.Module):
    """Its input is its query, key and value: one weight of three parts."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.m(x, x, x)[0]


class Computed(nn.Module):
    """A table that is stretched before it is looked up, as in the attention of SAM."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.l = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 4)
        self.register_buffer("at", torch.randint(0, 9, (5, 5)))

    def forward(self, x: Tensor) -> Any:
        table = nn.functional.interpolate(self.p[None, None], size=(9, 4), mode="bilinear")[0, 0]
        return torch.einsum("bqc,qkc->bqk", self.l(x), table[self.at])


STEPS, IDS = torch.randn(2, 5, 4), torch.randint(0, 11, (2, 5))
BOTH = ["e.weight@e.weight", "e.weight@h.weight"]
CASES: dict[str, tuple[nn.Module, Tensor, Any, set[str]]] = {
    "LSTM": (Recurrent("LSTM"), STEPS, "*", {"r.weight_ih_l0", "r.weight_hh_l0", "o.weight"}),
    "LSTM, its steps alone": (Recurrent("LSTM"), STEPS, ["*hh*"], {"r.weight_hh_l0"}),
    "GRU": (Recurrent("GRU"), STEPS, "*", {"r.weight_ih_l0", "r.weight_hh_l0", "o.weight"}),
    "GRU, two layers both ways": (
        Recurrent("GRU", num_layers=2, bidirectional=True), STEPS, ["r.*"],
        {f"r.weight_{k}h_l{i}{w}" for k in "ih" for i in "01" for w in ("", "_reverse")},
    ),
    "a table and its head": (Tied(), IDS, "*", {"e.weight", "l.weight"}),
    "each of them": (Tied(), IDS, BOTH, {*BOTH}),
    "the table": (Tied(), IDS, BOTH[:1], {BOTH[0]}),
    "the head": (Tied(), IDS, BOTH[1:], {BOTH[1]}),
    "the default plan": (Tied(), IDS, None, {"e.weight@h.weight", "l.weight"}),
    "a computed table": (Computed(), STEPS, "*", {"p~", "l.weight"}),
    "attention, the twin": (
        Attention(), torch.randn(2, 5, 8), "*", {"m.in_proj_weight", "m.out_proj.weight"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["switch", "load"])
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_reaches_it(name: str, mode: str, tmp_path: Path) -> None:
    model, x, include, keys = CASES[name]
    module = lora_fx.insert(model.eval(), (x,), rank=2, include=include, dead="allow")
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.3)
    path = tmp_path / "m.onnx"
    report = lora_fx.export(module.eval(), path, mode=mode, provider="cpu")
    assert set(module.updates) == keys
    assert report.details["targets"] == len(keys)
    stored = {i.name for i in onnx.load(path).graph.initializer}
    assert not any("@" in n and ".lora_" not in n for n in stored)  # a tied table is there once
    other = module.adapter()
    mixed = Adapter({k: u for i, (k, u) in enumerate(other.entries.items()) if i % 2 == 0})
    for adapter in (other, mixed):
        if mode == "load":
            session = Session(path, "cpu", adapter=adapter)
            got = session.run({"x": x.numpy()})
        else:
            session = Session(path, "cpu")
            base = next(iter(session.run({"x": x.numpy()}).values()))
            np.testing.assert_allclose(base, model(x).detach(), rtol=1e-4, atol=2e-6)
            session.load("one", adapter)
            got = session.run({"x": x.numpy()}, adapter="one")
        want = lora_fx.fold(model, (x,), adapter=adapter)(x).detach()
        np.testing.assert_allclose(next(iter(got.values())), want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("mode", ["switch", "load"])
def test_one_use_beside_all_of_them(mode: str, tmp_path: Path) -> None:
    model = Tied().eval()
    keys = ("e.weight", BOTH[1])
    two = [lora_fx.insert(model, (IDS,), include=[k], rank=2).adapter() for k in keys]
    with pytest.raises(lora_fx.LoraFxError, match="in all its uses, and also in one use") as caught:
        lora_fx.export(model, tmp_path / "m.onnx", (IDS,), adapters=two, mode=mode)
    assert caught.value.hint and not any(tmp_path.iterdir())


@pytest.mark.parametrize("use", BOTH)
def test_an_adapter_of_one_use_is_merged_into_a_file_of_mode_load(use: str, tmp_path: Path) -> None:
    model = Tied().eval()
    module = lora_fx.insert(model, (IDS,), include=[use], rank=2, init="orthogonal")
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.3)
    adapter = module.adapter()
    lora_fx.export(model, tmp_path / "l.onnx", (IDS,), adapters=adapter, mode="load")
    lora_fx.merge(tmp_path / "l.onnx", adapter, tmp_path / "m.onnx")
    got = Session(tmp_path / "m.onnx", "cpu").run({"x": IDS.numpy()})
    want = module.eval()(IDS).detach()
    np.testing.assert_allclose(next(iter(got.values())), want, rtol=1e-4, atol=2e-6)


def test_a_weight_that_something_else_reads_is_not_changed_where_it_is_stored(
    tmp_path: Path,
) -> None:
    class Read(nn.Module):
        """So wide that the exporter does not compute from its weights."""

        def __init__(self) -> None:
            super().__init__()
            self.r = nn.LSTM(4, 64, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.r(x)[0] * self.r.weight_hh_l0.norm()

    module = lora_fx.insert(Read().eval(), (STEPS,), rank=2, include="*hh*")
    with pytest.raises(lora_fx.LoraFxError, match=r"weight_hh_l0' is no target of the exported"):
        lora_fx.export(module, tmp_path / "m.onnx", mode="switch", provider="cpu")
    assert not (tmp_path / "m.onnx").exists()


def test_attach_leaves_out_what_only_a_graph_can_reach_unless_it_is_named() -> None:
    model = Computed().eval()
    with pytest.raises(lora_fx.LoraFxError, match=r"p~: the model computes this weight from p,"):
        lora_fx.attach(model, (STEPS,), rank=2, include="*")
    lora_fx.attach(model, (STEPS,), rank=2)
    assert set(model.adapter().lowrank) == {"l.weight"}
    assert any("p~" in n and "left out" in n for n in model.report().notes)


def test_a_start_that_changed_the_base_is_served(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).eval(), config
    )
    for name, p in wrapped.base_model.model.named_parameters():
        if "lora_" in name:
            p.data += 0.2
    wrapped.save_pretrained(tmp_path / "a")
    x = torch.randn(3, 6)
    want = lora_fx.fold(model, (x,), adapter=tmp_path / "a")(x).detach()
    lora_fx.export(
        model, tmp_path / "m.onnx", (x,), adapters={"a": tmp_path / "a"}, mode="switch",
        provider="cpu",
    )  # fmt: skip
    session = Session(tmp_path / "m.onnx", "cpu")
    session.load("a", tmp_path / "a.onnx_adapter")
    got = next(iter(session.run({"input": x.numpy()}, adapter="a").values()))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)
