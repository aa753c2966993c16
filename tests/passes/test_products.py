"""Two adapted weights that one op multiplies with each other: (W + ΔW)(U + ΔU).

On 1358f462 insert and attach refused an einsum of two weights with "report this model": branches
beside the op leave ΔW·ΔU out. An einsum of more operands has no such branches, and was right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import FOLD_TOL, ORT_TOL, rel
from lora_fx.fx.module.insertion import insertion_of

Form = Callable[[Any, Tensor], Tensor]


class Product(nn.Module):
    """Weights W, U and T, which a form multiplies."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8) * 0.3)
        self.u = nn.Parameter(torch.randn(8, 5) * 0.3)
        self.t = nn.Parameter(torch.randn(5, 5) * 0.3)
        self.last = nn.Linear(5, 3)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.form(self, x))
        return result


def _again(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("bi,ij,kj->bk", x, m.w, m.w)[:, :5]


FORMS: dict[str, Form] = {
    "a product of two": lambda m, x: x @ torch.einsum("ij,jk->ik", m.w, m.u),
    "its transpose": lambda m, x: x @ torch.einsum("ij,jk->ki", m.w, m.u).mT,
    "read the other way": lambda m, x: x @ torch.einsum("ji,kj->ik", m.w.mT, m.u.mT),
    "weight by weight": lambda m, x: x[:, :5] @ torch.einsum("ij,ij->ij", m.w[:5, :5], m.u[:5]),
    "a stack": lambda m, x: x @ torch.einsum("bij,bjk->bik", m.w[None], m.u[None])[0],
    "a product of three": lambda m, x: x @ torch.einsum("ij,jk,kl->il", m.w, m.u, m.t),
    "x with two": lambda m, x: torch.einsum("bi,ij,jk->bk", x, m.w, m.u),
    "x with three": lambda m, x: torch.einsum("bi,ij,jk,kl->bl", x, m.w, m.u, m.t),
    "one weight, twice": _again,
    # one adapted operand an op, whose branches stay beside it
    "one after the other": lambda m, x: x @ m.w @ m.u,
    "two ops": lambda m, x: torch.einsum("bj,jk->bk", torch.einsum("bi,ij->bj", x, m.w), m.u),
}


def drawn(module: Any) -> Adapter:
    """An adapter of the same keys whose effect is seen."""
    generator = np.random.default_rng(0)
    updates = {
        key: replace(u, b=generator.standard_normal(u.b.shape).astype(np.float32) * 0.2)
        for key, u in module.adapter().lowrank.items()
    }
    return Adapter(updates)


@pytest.mark.parametrize("name", FORMS)
def test_updates_of_two_operands_multiply_each_other(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Product(FORMS[name]).eval(), torch.randn(4, 6)
    module = lora_fx.insert(model, (x,), rank=2, include="*")
    adapter = drawn(module)
    module.load_adapter(adapter)
    exact = copy.deepcopy(model).double()
    for key, delta in adapter.deltas().items():
        exact.get_parameter(key).data += torch.from_numpy(delta).double()
    expected = exact(x.double()).detach().numpy()
    assert rel(model(x).detach().numpy(), expected) > 0.05
    assert rel(module.eval()(x).detach().numpy(), expected) < FOLD_TOL
    assert rel(lora_fx.fold(module)(x).detach().numpy(), expected) < FOLD_TOL
    module.train()(x).square().sum().backward()
    trained = [p for pair in insertion_of(module).slots().values() for p in pair]
    assert all(p.grad is not None and p.grad.any() for p in trained)
    live = lora_fx.attach(copy.deepcopy(model), (x,), rank=2, include="*")
    live.load_adapter(adapter)
    assert rel(live(x).detach().numpy(), expected) < FOLD_TOL
    report = lora_fx.export(module.eval(), tmp_path / "m.onnx", provider="cpu")
    assert max(p.rel for p in report.parity) < ORT_TOL
    path, adapters = tmp_path / "s.onnx", {"a": adapter}
    report = lora_fx.export(model, path, (x,), mode="switch", adapters=adapters, provider="cpu")
    assert max(p.rel for p in report.parity) < ORT_TOL
