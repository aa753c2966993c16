"""Several adapters in one module, and mixes: against explicit sums of ΔW and PEFT's numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter, mix
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.compare import FOLD_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.attach.attachment import attachment
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.ir.layout import plain_layout

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5)).eval()


def noise(base: nn.Module, seed: int, **options: Any) -> Adapter:
    m = lora_fx.insert(base, (X,), **options)
    entries = {}
    for key, u in m.updates.items():
        a, b = draw(key, u.layout, u.rank, seed, "probe")
        entries[key] = replace(u, a=a, b=b * np.float32(0.3))
    return Adapter(entries)


def explicit(base: nn.Module, *parts: tuple[Adapter, float]) -> np.ndarray[Any, Any]:
    """The model on W + Σ w·ΔW, in fp64."""
    state = {k: v.detach().double() for k, v in base.state_dict().items()}
    for adapter, w in parts:
        for key, delta in adapter.deltas().items():
            state[key] = state[key] + w * torch.from_numpy(delta)
    return torch.func.functional_call(base, state, (X.double(),)).detach().numpy()


def test_switch_mix_scale_and_back() -> None:
    base = model()
    one = noise(base, 1, rank=2)
    two = noise(base, 2, rank=3, include="0", variant="rslora")
    m = lora_fx.insert(base, (X,), rank=2)
    m.load_adapter(one)
    m.load_adapter(two, name="two")
    assert set(m.adapters) == {"default", "two"} and m.active == {"default": 1.0}

    def near(*parts: tuple[Adapter, float]) -> bool:
        return rel(m(X).detach().numpy(), explicit(base, *parts)) < FOLD_TOL

    assert near((one, 1.0)) and not near((two, 1.0))
    m.activate("two")
    assert near((two, 1.0)) and list(m.updates) == ["0.weight"]
    m.activate({"default": 0.7, "two": -0.4})
    assert near((one, 0.7), (two, -0.4))
    assert rel(lora_fx.fold(m)(X).numpy(), explicit(base, (one, 0.7), (two, -0.4))) < FOLD_TOL
    assert not any(p.requires_grad for p in m.parameters()), "a mix is for use"
    m.scale(0.5)
    assert near((one, 0.35), (two, -0.2))
    m.activate(None)
    assert torch.equal(m(X), base(X)) and not m.adapter().entries and m.active == {}
    assert torch.equal(lora_fx.fold(m)(X), base(X))
    m.activate("default")
    assert near((one, 1.0)) and all(
        "lora_" in n for n, p in m.named_parameters() if p.requires_grad
    )
    for wrong, words in (
        ("three", "no adapter 'three'"),
        ({"two": 1.0, "x": 1.0}, "no adapter 'x'"),
    ):
        with pytest.raises(LoraFxError, match=words):
            m.activate(wrong)
    m.activate({"two": 2.0})
    assert near((two, 2.0))
    m.activate(None)
    with pytest.raises(LoraFxError, match="name"):
        m.load_adapter(one)


def test_training_one_leaves_the_other_and_is_kept() -> None:
    base = model()
    one, two = noise(base, 1, rank=2), noise(base, 2, rank=2)
    m = lora_fx.insert(base, (X,), rank=2)
    m.load_adapter(one)
    m.load_adapter(two, name="two")
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    m(X).square().mean().backward()
    optimizer.step()
    trained = m.adapter()
    m.activate("two")
    for key, u in m.adapter().lowrank.items():
        assert np.array_equal(u.a, two.lowrank[key].a)
    m.activate("default")
    for key, u in m.adapter().lowrank.items():
        assert np.array_equal(u.b, trained.lowrank[key].b)
        assert not np.array_equal(u.b, one.lowrank[key].b)
    assert np.array_equal(m.adapter("two").lowrank["0.weight"].b, two.lowrank["0.weight"].b)


def test_equal_forms_switch_without_a_new_program() -> None:
    base = model()
    m = lora_fx.insert(base, (X,), rank=2)
    m(X)
    before = dict(m._programs.compiled)
    m.load_adapter(noise(base, 3, rank=2))
    assert m._programs.compiled == before


@given(st.integers(1, 4), st.integers(1, 4), st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 99))
def test_mixes(r: int, q: int, v: float, w: float, seed: int) -> None:
    rng, layout = np.random.default_rng(seed), plain_layout((6, 8))
    one, two = (
        Adapter(
            {
                "w": LowRank(
                    rng.standard_normal((k, 8)).astype(np.float32),
                    rng.standard_normal((6, k)).astype(np.float32),
                    3.0,
                    layout,
                )
            }
        )
        for k in (r, q)
    )
    want = v * one.deltas()["w"] + w * two.deltas()["w"]
    size = max(1.0, float(np.abs(want).max()))
    cat = mix([(one, v), (two, w)])
    assert cat.lowrank["w"].rank == r + q
    assert np.abs(cat.deltas()["w"] - want).max() < 1e-5 * size
    best = mix([(one, v), (two, w)], how="svd", rank=2).deltas()["w"]
    s = np.linalg.svd(want, compute_uv=False)
    assert np.linalg.matrix_rank(best, tol=1e-4 * size) <= 2
    error = np.linalg.norm(best - want)
    assert error <= np.sqrt((s[2:] ** 2).sum()) + 1e-5 * size, "Eckart and Young"


def test_a_linear_mix_is_pefts() -> None:
    peft = pytest.importorskip("peft")

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(x)
            return out

    base = Named().eval()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc"], init_lora_weights=False)
    theirs = peft.get_peft_model(base, config, adapter_name="one")
    theirs.add_adapter("two", config)
    layer = theirs.base_model.model.fc
    ours = [
        Adapter(
            {
                "fc.weight": LowRank(
                    layer.lora_A[n].weight.detach().numpy().copy(),
                    layer.lora_B[n].weight.detach().numpy().copy(),
                    3.0,
                    plain_layout((6, 8)),
                )
            }
        )
        for n in ("one", "two")
    ]
    for how in ("linear", "cat", "svd"):
        theirs.add_weighted_adapter(["one", "two"], [0.7, -0.3], f"m_{how}", combination_type=how)
        want = layer.get_delta_weight(f"m_{how}").detach().numpy()
        got = mix(list(zip(ours, (0.7, -0.3), strict=True)), how=how).deltas()["fc.weight"]
        assert rel(got, want) < 1e-5, how


def test_mixes_that_cannot_be() -> None:
    base = model()
    one, two = noise(base, 1, rank=2), noise(base, 2, rank=3)
    whole = lora_fx.insert(base, (X,), rank=2, also_train="2").adapter()
    for parts, how, rank, words in (
        ([(one, 1.0), (two, 1.0)], "linear", None, "equal ranks"),
        ([(one, 1.0)], "mean", None, "unknown mix 'mean'"),
        ([(one, 1.0)], "cat", 3, "does not take a rank"),
        ([(one, 1.0), (whole, 0.5)], "cat", None, "whole tensor"),
    ):
        with pytest.raises(LoraFxError, match=words):
            mix(parts, how=how, rank=rank)


def test_a_tensor_that_one_adapter_replaces_and_another_adapts() -> None:
    """Both come back as they were; and while one adapts the tensor, it does not train whole."""
    base = model()
    low = noise(base, 1, rank=2)
    assert "2.weight" in low
    whole = lora_fx.insert(base, (X,), rank=2, include="0", also_train="2")
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        want = {"low": explicit(base, (low, 1.0)), "whole": whole(X).numpy()}
    m = lora_fx.insert(base, (X,), rank=2, include="0", also_train="2")
    m.load_adapter(low, name="low")
    m.load_adapter(whole.adapter(), name="whole")
    for name in ("low", "whole", "low", "whole", "low"):
        m.activate(name)
        with torch.no_grad():
            assert rel(m(X).numpy(), want[name]) < FOLD_TOL, name
        assert m.get_parameter("2.weight").requires_grad == (name == "whole")
    assert rel(m.adapter().deltas()["2.weight"], low.deltas()["2.weight"]) < 1e-6


class Feeding(nn.Module):
    """A norm feeds two layers, and a gate one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.q, self.k = nn.LayerNorm(18), nn.Linear(18, 20), nn.Linear(18, 20)
        self.down = nn.Linear(20, 17)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        made: torch.Tensor = self.down(F.silu(self.q(x)) * self.k(x))
        return made


@pytest.mark.parametrize("verb", ["insert", "attach"])
def test_compiled_ranks(verb: str) -> None:
    """Adapters of other ranks run through the first compilation, with their own numbers."""
    x, model = torch.randn(3, 7, 18), Feeding()
    kept = {n: p.detach().double() for n, p in model.named_parameters()}
    ranks: dict[int, Adapter] = {}
    for rank in (4, 8, 16):
        made = lora_fx.insert(Feeding(), (x,), rank=rank, seed=rank, dead="allow")
        rng = np.random.default_rng(rank)
        update = {k: replace(u, b=rng.normal(size=u.b.shape)) for k, u in made.updates.items()}
        ranks[rank] = Adapter(update)
    mixed = {k: ranks[4 if k.startswith("q") else 8].entries[k] for k in ranks[4].entries}
    m: Any = lora_fx.insert(model, (x,), rank=4) if verb == "insert" else model
    if verb == "attach":
        lora_fx.attach(m, (x,), rank=4)
    m.train()
    m(x)  # captured before it is compiled
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    m.compile(backend="aot_eager", fullgraph=True)
    m.load_adapter(ranks[4])
    m(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for adapter in (ranks[8], ranks[16], ranks[4], Adapter(mixed)):
            m.load_adapter(adapter)
            held = m.adapter().lowrank
            assert all(np.allclose(held[k].b, u.b) for k, u in adapter.lowrank.items())
            y = m(x)
            y.square().sum().backward()
            wide = {k: kept[k] + torch.from_numpy(d) for k, d in adapter.deltas().items()}
            want = torch.func.functional_call(Feeding().double(), {**kept, **wide}, (x.double(),))
            assert rel(y.detach().numpy(), want.detach().numpy()) < 2e-6
            state = insertion_of(m) if verb == "insert" else attachment(m)
            grads = [p.grad for pair in state.slots().values() for p in pair]
            assert all(g is not None and g.abs().max() > 0 for g in grads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
