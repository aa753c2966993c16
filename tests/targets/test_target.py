"""Parts of fused weights: roles by data flow, regions within a target, ranks of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import FOLD_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.execution import execution_of
from tests.zoo.models import ZOO
from tests.zoo.shared import captured


class Fused(nn.Module):
    """q, k, v in one matrix [in, out], cut up in several ways; gate and up in one [out, in]."""

    def __init__(self, cut: Callable[[torch.Tensor], Any], eager: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Parameter(torch.randn(8, 30) / 8**0.5)
        self.gate_up = nn.Linear(10, 24)
        self.down = nn.Linear(12, 6)
        self.cut, self.eager = cut, eager

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.cut(x @ self.qkv)
        if self.eager:
            y = torch.softmax((q * 0.3) @ k.transpose(-1, -2), -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        gate, up = self.gate_up(y).chunk(2, -1)
        out: torch.Tensor = self.down(F.silu(gate) * up)
        return out


CUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "chunk": lambda y: y.chunk(3, -1),
    "split": lambda y: y.split(10, -1),
    "slices": lambda y: (y[..., :10], y[..., 10:20], y[..., 20:]),
    "unbind": lambda y: y.unflatten(-1, (3, 10)).unbind(-2),
    "view and permute": lambda y: y.view(*y.shape[:2], 3, 10).permute(2, 0, 1, 3),
}
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_roles_by_data_flow(cut: str, eager: bool) -> None:
    found = lora_fx.find(Fused(CUTS[cut], eager).eval(), (X,))
    assert found["qkv"].parts == (
        ("q", "qkv[:, 0:10]"),
        ("k", "qkv[:, 10:20]"),
        ("v", "qkv[:, 20:30]"),
    )
    assert found["gate_up.weight"].parts == (
        ("gate", "gate_up.weight[0:12]"),
        ("up", "gate_up.weight[12:24]"),
    )


def test_the_table_says_how_many_parts_have_no_role() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.abc = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b, c = self.abc(x).chunk(3, -1)
            return a * b + c

    text = str(lora_fx.find(Three().eval(), (torch.randn(2, 8),)))
    assert " 3 parts " in text and "?" not in text


def test_parts_interleaved_by_heads_are_no_regions() -> None:
    def by_head(y: torch.Tensor) -> Any:
        heads = y.view(*y.shape[:2], 2, 3, 5)
        return tuple(heads[:, :, :, i].flatten(2) for i in range(3))

    assert lora_fx.find(Fused(by_head).eval(), (X,))["qkv"].parts == ()


def noise(m: Any) -> Adapter:
    entries = {}
    for key, u in m.updates.items():
        a, b = draw(key, u.layout, u.rank, 3, "probe")
        entries[key] = replace(u, a=a, b=b * np.float32(0.3))
    return Adapter(entries)


@pytest.mark.parametrize("shift", [0, 1])
def test_two_of_three_parts_with_ranks_of_their_own(shift: int) -> None:
    """Against the explicit W + ΔW in fp64; shifted by one row it must not hold."""
    model = Fused(CUTS["chunk"]).eval()
    plan = {"qkv[:, 0:10]": 3, "qkv[:, 20:30]": {"rank": 2, "alpha": 5}}
    m = lora_fx.insert(model, (X,), plan=plan)
    assert [u.rank for u in m.updates.values()] == [3, 2]
    m.load_adapter(noise(m))
    wide = Fused(CUTS["chunk"]).double()
    with torch.no_grad():
        before = wide(X.double()).numpy()
        for (lo, hi), d in zip(((0, 10), (20, 30)), m.adapter().deltas().values(), strict=True):
            wide.qkv[:, lo:hi] += torch.from_numpy(np.roll(d, shift, axis=1))
        want = wide(X.double()).numpy()
    assert rel(want, before) > 0.05
    ok = [rel(y.detach().numpy(), want) < 5 * FOLD_TOL for y in (m(X), lora_fx.fold(m)(X))]
    assert ok == [not shift] * 2


def test_selectors_of_parts() -> None:
    cap = lora_fx.capture(Fused(CUTS["split"]).eval(), (X,))

    def keys(**options: Any) -> list[str]:
        return list(lora_fx.insert(cap, rank=2, **options).updates)

    assert keys(include="role:q,role:v") == ["qkv[:, 0:10]", "qkv[:, 20:30]"]
    assert keys(include="gate") == ["gate_up.weight[0:12]"]
    assert keys(include="qkv,role:v") == ["qkv"], "the whole has the part"
    assert keys(include="qkv[:, 3:7]") == ["qkv[:, 3:7]"]
    assert keys(exclude="role:k,down") == [
        "qkv[:, 0:10]",
        "qkv[:, 20:30]",
        "gate_up.weight",
    ]
    with pytest.raises(LoraFxError, match="share elements"):
        keys(plan={"qkv[:, 0:10]": 2, "qkv[:, 5:12]": 2})
    with pytest.raises(LoraFxError, match="not a target"):
        keys(plan={"qkv[:, 0:99]": 2})


def test_one_expert_of_a_stack() -> None:
    cap, *_ = captured("hf_mixtral")
    model = cap.model
    key = next(t.key for t in lora_fx.find(cap).targets if "gate_up" in t.key)
    m = lora_fx.insert(cap, rank=2, include=f"{key}[1]", dead="allow")
    (update,) = m.updates.values()
    assert list(m.updates) == [f"{key}[1]"] and update.layout.stored[0] == 1
    m.load_adapter(noise(m))
    folded = lora_fx.fold(m)
    changed = folded.get_parameter(key) != model.get_parameter(key)
    assert changed[1].all() and not changed[[0, *range(2, len(changed))]].any()
    named = execution_of(m).sample()
    branched_outputs = execution_of(m).flat(named)
    folded_outputs = execution_of(folded).flat(named)
    for a, b in zip(branched_outputs.values(), folded_outputs.values(), strict=True):
        assert rel(b, a) < 2e-6


@pytest.mark.parametrize("name", ["hf_gpt2/1", "mha", "transformer_encoder", "tv_vit", "timm_vit"])
def test_fused_qkv_of_real_models(name: str) -> None:
    if name.partition("/")[0] not in ZOO:
        pytest.skip(f"{name} is not in the zoo")
    m = lora_fx.insert(captured(name)[0], rank=2, include="role:q,role:v")
    assert m.updates and all("[" in k for k in m.updates)
    m.load_adapter(noise(m))
    folded = lora_fx.fold(m)
    named = execution_of(m).sample()
    branched_outputs = execution_of(m).flat(named)
    folded_outputs = execution_of(folded).flat(named)
    for a, b in zip(branched_outputs.values(), folded_outputs.values(), strict=True):
        assert rel(b, a) < 2e-6


class Attention(nn.Module):
    """Attention whose projections are one matrix, or three."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv_proj = nn.Linear(8, 20, bias=False)
        else:
            self.q_proj, self.k_proj = (nn.Linear(8, 6, bias=False) for _ in range(2))
            self.v_proj = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            q, k, v = self.qkv_proj(x).split([6, 6, 8], -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return F.scaled_dot_product_attention(q, k, v)


class Model(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.attn = Attention(fused=fused)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attn(x)
        return out


@pytest.mark.parametrize("trained_on_fused", [False, True])
def test_adapters_of_split_projections_on_a_fused_weight_and_back(
    trained_on_fused: bool, tmp_path: Any
) -> None:
    apart, joined = Model(fused=False).eval(), Model(fused=True).eval()
    with torch.no_grad():
        weights = [apart.attn.get_parameter(f"{n}_proj.weight") for n in "qkv"]
        joined.attn.qkv_proj.weight.copy_(torch.cat(weights))
    source, target = (joined, apart) if trained_on_fused else (apart, joined)
    m = lora_fx.insert(source, (X,), rank=2)
    m.load_adapter(noise(m))
    lora_fx.save_adapter(m.adapter(), tmp_path / "a")
    loaded = lora_fx.load_adapter(tmp_path / "a")
    n = lora_fx.insert(target, (X,), adapter=loaded)
    assert len(n.updates) == 3
    want = m(X).detach().numpy()
    assert rel(want, source(X).detach().numpy()) > 0.05
    assert rel(n(X).detach().numpy(), want) < 2e-6
    assert rel(lora_fx.fold(n)(X).numpy(), want) < 2e-6
    odd = Adapter({"attn.o_proj.weight": next(iter(loaded.lowrank.values()))})
    with pytest.raises(LoraFxError, match="not a target of the model"):
        odd.bind(target, (X,))
