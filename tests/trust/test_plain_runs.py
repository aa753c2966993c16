"""What a model does in a plain run, and torch.export refuses or does otherwise.

On 1358f462 the loops over chosen experts, a module that casts a part of itself and code that
forgets a case while it is compiled were refused, and a recorded run left the gradient switched off
behind a `no_grad` block: for the rest of the graph, and for whatever the user ran after it.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.fx.module.insertion import insertion_of
from tests.fx.module.test_module import perturb

EXPERTS = 4


class Mixture(nn.Module):
    """Two experts of four for each row; how the loop runs over them is a subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(F.softmax(self.gate(x), -1), 2)
        mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        result = torch.zeros_like(x)
        self.loop(x, weights, mask, result)
        return result

    def loop(self, x: Tensor, weights: Tensor, mask: Tensor, result: Tensor) -> None:
        raise NotImplementedError


class ByTensor(Mixture):
    """Mixtral as it was."""

    def loop(self, x: Tensor, weights: Tensor, mask: Tensor, result: Tensor) -> None:
        for expert in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            place, rows = torch.where(mask[expert].squeeze(0))
            result.index_add_(0, rows, self.experts[expert](x[rows]) * weights[rows, place, None])


class ByNumber(Mixture):
    def loop(self, x: Tensor, weights: Tensor, mask: Tensor, result: Tensor) -> None:
        for expert in torch.nonzero(mask.sum((-1, -2)) > 0).squeeze(-1):
            place, rows = torch.where(mask[expert])
            y = self.experts[int(expert)](x[rows])
            result.index_add_(0, rows, y * weights[rows, place, None])


class ByItem(Mixture):
    def loop(self, x: Tensor, weights: Tensor, mask: Tensor, result: Tensor) -> None:
        for hit in mask.sum((-1, -2)).nonzero():
            expert = hit.item()
            place, rows = torch.where(mask[expert])
            y = self.experts[expert](x[rows])
            result.index_add_(0, rows, y * weights[rows, place, None])


class ByName(Mixture):
    """Switch Transformers and NLLB: the name of an expert is made of its number."""

    def loop(self, x: Tensor, weights: Tensor, mask: Tensor, result: Tensor) -> None:
        named = dict(self.experts.named_children())
        for hit in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            place, rows = torch.where(mask[hit].squeeze(0))
            result.index_add_(0, rows, named[f"{hit[0]}"](x[rows]) * weights[rows, place, None])


class Skipping(Mixture):
    def loop(self, x: Tensor, weights: Tensor, mask: Tensor, result: Tensor) -> None:
        for hit in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            expert = hit[0]
            if expert == EXPERTS:
                continue
            place, rows = torch.where(mask[expert])
            y = self.experts[expert](x[rows])
            result.index_add_(0, rows, y * weights[rows, place, None])


class Unmasked(Mixture):
    """The twin: an expert that nobody chose would add something here."""

    def loop(self, x: Tensor, weights: Tensor, mask: Tensor, result: Tensor) -> None:
        for expert in torch.greater(mask[:, 0].sum(-1), 1).nonzero():
            result.add_(self.experts[expert](x))


class Casts(nn.Module):
    """Casts a part of itself to the dtype that it has, in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 5)
        self.head = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.gate = self.gate.to(torch.float32)
        return self.head.float()(self.gate(x).relu())


class Compiled(Casts):
    """Forgets a case where it is compiled, as the masks of Switch Transformers do."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and not torch.compiler.is_compiling():
            mask = torch.ones_like(x[:, :1])
        return self.head(self.gate(x).relu() * mask[:, :1])


SERVED = [ByTensor, ByNumber, ByItem, ByName, Skipping, Casts, Compiled]


def by_hand(model: nn.Module, module: Any) -> nn.Module:
    """The model's own code over W + s·BA."""
    result = copy.deepcopy(model)
    for key, delta in module.adapter().deltas().items():
        result.get_parameter(key).data += torch.from_numpy(np.asarray(delta)).float()
    return result


def inserted(kind: type[nn.Module]) -> tuple[nn.Module, Any, Tensor]:
    """A model, its branches with values, and an example."""
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(7, 6)
    module = lora_fx.insert(model, (x,), rank=2, include="*", dead="allow")
    perturb(module)
    return model, module, x


@pytest.mark.parametrize("kind", SERVED)
def test_the_graph_holds_for_all_values_and_sizes(kind: type[nn.Module]) -> None:
    model, module, x = inserted(kind)
    assert not insertion_of(module).found.pinned
    weights = {n for n, p in model.named_parameters() if p.dim() == 2}
    assert set(module.updates) == weights
    want = by_hand(model, module)
    for rows in (7, 3, 40):
        value = torch.randn(rows, 6)
        expected = want(value).detach().numpy()
        assert rel(expected, model(value).detach().numpy()) > 0.02, "the adapter decides"
        assert rel(module.eval()(value).detach().numpy(), expected) < 1e-6
    assert_gradients(module, want, torch.randn(40, 6))

    lora_fx.attach(model, (x,), adapter=module.adapter())
    value = torch.randn(40, 6)
    assert rel(model(value).detach().numpy(), want(value).detach().numpy()) < 1e-6
    lora_fx.detach(model)


def assert_gradients(module: Any, want: nn.Module, x: Tensor) -> None:
    """∂L/∂B = s·G·Aᵀ and ∂L/∂A = s·Bᵀ·G, where G is ∂L/∂W of the model's own code."""
    for p in module.parameters():
        p.grad = None
    module.train()(x).square().sum().backward()
    want.train()(x).square().sum().backward()
    for key, low in module.adapter().lowrank.items():
        a, b = insertion_of(module).slots()[key]
        gradient = want.get_parameter(key).grad.double()
        want_a = low.scale * b.detach().double().T @ gradient
        want_b = low.scale * gradient @ a.detach().double().T
        assert rel(a.grad.numpy(), want_a.numpy()) < 1e-5, key
        assert rel(b.grad.numpy(), want_b.numpy()) < 1e-5, key


def test_a_loop_whose_turns_are_not_idle_is_refused() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="depends on a tensor's value"):
        lora_fx.insert(Unmasked().eval(), (torch.randn(7, 6),), rank=2, include="*")


# A recorded run: what runs without gradient is cut off, and nothing else is.


class Recorded(nn.Module):
    """Reads a value, so that one run has to stand for the model."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.b = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        if float((hidden * 0).sum()) == 0.0:
            hidden = hidden / self.largest(hidden)
        return self.b(hidden)

    def largest(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class Block(Recorded):
    def largest(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return hidden.abs().max()


class Decorated(Recorded):
    @torch.no_grad()
    def largest(self, hidden: Tensor) -> Tensor:
        return hidden.abs().max() + 1


class Switched(Recorded):
    def largest(self, hidden: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            value = hidden.abs().mean()
        return value + hidden.square().mean()


class Nested(Recorded):
    def largest(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            value = hidden.abs().max()
            with torch.enable_grad():
                square = hidden.square().mean()
            value = value + 1
        return value + square


class Parts(Recorded):
    def largest(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            values, _ = hidden.abs().sort(0)
        return values[-1] + 1


class Gradient(Recorded):
    """The twin: nothing is switched."""

    def largest(self, hidden: Tensor) -> Tensor:
        return hidden.abs().max()


@pytest.mark.parametrize("kind", [Block, Decorated, Switched, Nested, Parts, Gradient])
def test_a_recorded_run_switches_no_gradient_off(kind: type[Recorded]) -> None:
    model, module, x = inserted(kind)
    assert {p.rung for p in insertion_of(module).found.pinned} == {"recorded"}
    want = by_hand(model, module)
    assert rel(module.eval()(x).detach().numpy(), want(x).detach().numpy()) < 1e-6
    assert torch.is_grad_enabled()
    assert_gradients(module, want, x)


# Numbers that numpy draws: refused in one line, with the way on of the models that are known.


class Masked(nn.Module):
    """Draws a mask by numpy in train mode, as the SpecAugment of WavLM and Hubert does."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and getattr(self.config, "apply_spec_augment", True):
            x = x * torch.from_numpy(np.random.rand(6)).float()
        return self.fc(x)


@pytest.mark.parametrize(
    ("config", "way"),
    [
        (SimpleNamespace(apply_spec_augment=True), "set config.apply_spec_augment = False"),
        (SimpleNamespace(), "draw them with torch"),
        (None, "draw them with torch"),
    ],
)
def test_numbers_of_numpy_are_refused_with_the_way_on(config: Any, way: str) -> None:
    module = lora_fx.insert(Masked(config).eval(), (torch.randn(7, 6),), rank=2, dead="allow")
    with pytest.raises(lora_fx.LoraFxError, match="draws random numbers with numpy") as caught:
        module.train()(torch.randn(7, 6))
    assert caught.value.hint.startswith(way)
    assert caught.value.hint.endswith("; or use lora_fx.attach, which trains the live model")


def test_the_way_on_is_one() -> None:
    model = Masked(SimpleNamespace(apply_spec_augment=False)).eval()
    module = lora_fx.insert(model, (torch.randn(7, 6),), rank=2)
    module.train()(torch.randn(7, 6)).square().sum().backward()
    assert all(b.grad.any() for _, b in insertion_of(module).slots().values())
