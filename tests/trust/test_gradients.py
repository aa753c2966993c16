"""Gradients that are not those of the forward: refused for insert, kept by attach.

On 788628f Reversed, Hooked, ModuleHooked, Clipped and Straight were inserted without a word and
trained along the gradient of the forward: Reversed in the opposite direction.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.fx.module.insertion import insertion_of


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Straight(torch.autograd.Function):
    """Rounds, and lets the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Saving(torch.autograd.Function):
    """Swish that keeps its input only; its gradient is the true one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * (s + x * s * (1 - s))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.between(torch.tanh(self.a(x))))
        return result


class Reversed(Two):
    def between(self, h: Tensor) -> Tensor:
        return Reverse.apply(h)


class Quantised(Two):
    def between(self, h: Tensor) -> Tensor:
        return h + Straight.apply(h)


class Hooked(Two):
    def between(self, h: Tensor) -> Tensor:
        h = h * 1.0
        if h.requires_grad:
            h.register_hook(lambda g: g * 3)
        return h


class Clipped(Two):
    def between(self, h: Tensor) -> Tensor:
        h = h * 1.0
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return h


class ModuleHooked(Two):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))


class Memory(Two):
    def between(self, h: Tensor) -> Tensor:
        return Saving.apply(h)


class Watching(Two):
    """A hook that only looks."""

    def between(self, h: Tensor) -> Tensor:
        h = h * 1.0
        if h.requires_grad:
            h.register_hook(lambda g: None)
        return h


OWN = [Reversed, Quantised, Hooked, Clipped, ModuleHooked]


@pytest.mark.parametrize("kind", OWN)
def test_insert_refuses_and_attach_keeps_it(kind: type[Two]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(5, 4)
    with pytest.raises(lora_fx.LoraFxError, match="custom gradient") as e:
        lora_fx.insert(model, (x,), rank=2)
    assert "attach" in e.value.hint
    lora_fx.insert(model, (x,), rank=2, dead="allow")
    live = copy.deepcopy(model)
    lora_fx.attach(live, (x,), rank=2)
    live.train()(x).sum().backward()
    assert all(p.grad is not None for p in live.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", [Two, Memory, Watching])
def test_what_has_the_true_gradient_is_served(kind: type[Two]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(5, 4)
    assert lora_fx.insert(model, (x,), rank=2).updates


def test_attach_leaves_a_capture_as_careful_as_it_was() -> None:
    torch.manual_seed(0)
    cap = lora_fx.capture(Reversed(), (torch.randn(5, 4),))
    lora_fx.detach(lora_fx.attach(cap, rank=2))
    with pytest.raises(lora_fx.LoraFxError, match="custom gradient"):
        lora_fx.insert(cap, rank=2)


class Starred(Reversed):
    def forward(self, x: Tensor, /, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + y.sum()


class Idle(Memory):
    """One of its weights has no gradient at these inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.relu(self.a(x) - 1e6).sum()


def test_calls_and_weights_of_every_kind() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    with pytest.raises(lora_fx.LoraFxError, match="custom gradient"):
        lora_fx.insert(Starred(), (x, x), rank=2)
    assert lora_fx.insert(Idle(), (x,), rank=2, include="*", dead="drop").updates


class Stateful(nn.Module):
    """Writes over what backward needs, where it keeps a state: in eval mode, or in both."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.a, self.b, self.always = nn.Linear(4, 4), nn.Linear(4, 4), always

    def forward(self, x: Tensor) -> Any:
        h = torch.exp(self.a(x))
        y = self.b(h)
        if self.always or not self.training:
            h[:, 0] = y[:, 0]
        return y


def test_a_model_whose_eval_mode_has_no_backward_is_trained() -> None:
    model, x = Stateful(always=False).eval(), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="inplace"):
        model(x).sum().backward()
    module = lora_fx.insert(model, (x,), rank=2)
    assert set(module.updates) == {"a.weight", "b.weight"}
    assert any("eval mode is not proven" in n for n in insertion_of(module).effect.notes)
    lora_fx.attach(copy.deepcopy(model), (x,), rank=2)


def test_a_model_without_any_backward_is_an_error_of_one_line() -> None:
    for verb in (lora_fx.insert, lora_fx.attach):
        with pytest.raises(lora_fx.LoraFxError, match="no backward pass of the model runs"):
            verb(Stateful(always=True).eval(), (torch.randn(3, 4),), rank=2)


class Vanishing(nn.Module):
    """Layers whose gradients lie far apart: without the least, the median is a large one."""

    GAINS = (1e-18, 1e-9, 1e-9, 1, 1)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in self.GAINS)

    def forward(self, x: Tensor) -> Tensor:
        parts = [gain * layer(x) for gain, layer in zip(self.GAINS, self.layers, strict=True)]
        return torch.stack(parts).sum(0)


def test_all_that_is_dead_is_left_out_though_each_drop_moves_the_median() -> None:
    module = lora_fx.insert(Vanishing().eval(), (torch.randn(3, 8),), rank=2, dead="drop")
    assert set(module.updates) == {"layers.3.weight", "layers.4.weight"}
    said = " ".join(module.notes)
    assert all(f"layers.{i}.weight: left out, no gradient" in said for i in range(3))
