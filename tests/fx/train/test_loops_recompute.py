"""Recomputed blocks: the losses, gradients and statistics of blocks that are not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from tests.fx.attach.attached import leaves, randomise
from tests.zoo.models import ZOO


class Norms(nn.Module):
    """Convolutions whose batch norms move, and dropout, in three blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = [(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.2))] * 3
        self.blocks = nn.ModuleList(nn.Sequential(*copy.deepcopy(p), nn.GELU()) for p in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.blocks:
            x = x + part(x)
        return x


def built(name: str) -> tuple[nn.Module, Any, Any]:
    if name == "norms":
        return Norms().eval(), (torch.randn(3, 4, 6, 6),), {}
    return ZOO[name].build()


# dropout is on in train mode
MODELS = {
    "norms": {"norm_stats": "update"},
    "hf_bert": {},
    "hf_gpt2": {},
    "tv_resnet18": {"norm_stats": "update"},
}
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("hf_bert", "hf_gpt2", "tv_resnet18")]


def step(model: nn.Module, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers of one step in train mode, and the bytes saved for backward."""
    saved = 0

    def pack(t: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += t.numel() * t.element_size() if not isinstance(t, nn.Parameter) else 0
        return t

    model.train().zero_grad()
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = leaves(model(*args, **kwargs))
        loss = sum((t - 0.3).square().mean() for t in out if t.is_floating_point())
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    got |= {n: b.clone() for n, b in model.named_buffers()}
    return {**got, "loss": loss.detach(), "saved": torch.tensor(saved)}


@pytest.mark.parametrize("name", ["norms", *SLOW])
def test_bit_equal_by_the_names_of_transformers(name: str) -> None:
    model, args, kwargs = built(name)
    m = lora_fx.insert(model, args, kwargs, rank=2, dropout=0.1, **MODELS[name])
    randomise(m)
    start = copy.deepcopy(m.state_dict())
    plain = step(m, args, kwargs)
    saved = plain.pop("saved")
    assert all(n in plain for n, p in m.named_parameters() if p.requires_grad), "all have gradients"
    for options in (
        {},
        {"every_n_layers": 2},
        {"offload": True},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False, "early_stop": False}},
    ):
        m.load_state_dict(start)
        m.gradient_checkpointing_enable(**options)
        assert m.is_gradient_checkpointing
        again = step(m, args, kwargs)
        less = again.pop("saved")
        assert less < saved * (0.75 if "every_n_layers" not in options else 1.0)
        assert list(again) == list(plain)
        assert [k for k in plain if not torch.equal(plain[k], again[k])] == []
    m.load_state_dict(start)
    m.gradient_checkpointing_disable()
    assert not m.is_gradient_checkpointing
    assert step(m, args, kwargs)["saved"] == saved


def test_every_second_block_and_hooks() -> None:
    m, x = looped(nn.ModuleList(block() for _ in range(4)), range(4))
    ran: list[int] = []
    for i, part in enumerate(m.blocks):
        part.register_forward_hook(lambda *_, i=i: ran.append(i))
    m.activation_checkpointing_enable(every_n_layers=3)
    assert [b.recompute for b in m.blocks] == [True, False, False, True]
    step(m, (x,), {})
    assert ran == [0, 1, 2, 3], "recomputing calls no hook again"
    m.eval().activation_checkpointing_enable()
    assert step(copy.deepcopy(m), (x,), {})["loss"] == step(m, (x,), {})["loss"]


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))


class Looped(nn.Module):
    """Blocks that run in a given order."""

    def __init__(self, blocks: nn.Module, order: Any) -> None:
        super().__init__()
        self.blocks, self.order = blocks, list(order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in self.order:
            x = x + self.blocks[i](x)
        return x


def looped(blocks: nn.Module, order: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    return lora_fx.insert(Looped(blocks, order), (x,), rank=2), x


def test_one_module_in_two_places() -> None:
    one = block()
    m, x = looped(nn.ModuleList([one, one]), range(2))
    plain = step(m, (x,), {})
    m.activation_checkpointing_enable()
    again = step(m, (x,), {})
    assert all(torch.equal(plain[k], again[k]) for k in plain if k != "saved")


def test_what_cannot_be_recomputed_is_said() -> None:
    refused = lora_fx.LoraFxError
    m, x = looped(nn.ModuleList(block() for _ in range(2)), [0, 1, 0])
    with pytest.raises(refused, match=r"cannot recompute blocks\.0: other parts of the model run"):
        m.activation_checkpointing_enable()
    assert not m.is_activation_checkpointing
    m._programs.compiled.clear(), m._programs.inlined.clear()
    m.activation_checkpointing_enable()
    with pytest.raises(refused, match=r"cannot recompute blocks\.0"):
        m.train()(x)
    with pytest.raises(refused, match="with reentrant checkpointing the adapters get no gradients"):
        m.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(refused, match="no option every"):
        m.gradient_checkpointing_enable({"every": 2})
    with pytest.raises(refused, match="every_n_layers is 0"):
        m.gradient_checkpointing_enable(every_n_layers=0)
    lone = lora_fx.insert(nn.Bilinear(4, 4, 3), (torch.randn(2, 4), torch.randn(2, 4)), rank=2)
    with pytest.raises(refused, match="Bilinear has no blocks"):
        lone.gradient_checkpointing_enable()


def test_compiled() -> None:
    m, x = looped(nn.ModuleList(block() for _ in range(2)), range(2))
    randomise(m)
    want = step(m, (x,), {})
    m.activation_checkpointing_enable()
    torch._dynamo.reset()
    got = step(torch.compile(m, backend="aot_eager", fullgraph=True), (x,), {})
    torch.testing.assert_close(got["loss"], want["loss"])
    torch._dynamo.reset()
