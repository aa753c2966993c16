"""Classes of failures that lots of architectures showed: a small module for each.

On the commit before its cure each was red: a raw exception, or a refusal of a model that runs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.compare import rel
from tests.fx.module.test_module import perturb


class Mapped(nn.Module):
    """A mask made by torch.vmap, as transformers' are where a model changes them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])

        def seen(q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & k.new_ones((), dtype=torch.bool)

        mask = torch.vmap(torch.vmap(seen, in_dims=(None, 0)), in_dims=(0, None))(at, at)
        h: Tensor = self.a(x)
        return torch.where(mask, h @ h.mT, -9.0).softmax(-1) @ h


class MappedRows(nn.Module):
    """One vmap over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.vmap(lambda row: torch.tanh(row * 2))(self.a(x))
        result: Tensor = self.b(h)
        return result


class MappedTwice(Mapped):
    """Two in a row, whose levels have one number."""

    def forward(self, x: Tensor) -> Tensor:
        def top(v: Tensor) -> Tensor:
            return v - v.max()

        h = torch.vmap(top)(super().forward(x).flatten(1))
        return torch.vmap(top)(h * 2) + h


VMAPS = [Mapped, MappedRows, MappedTwice]


@pytest.mark.parametrize("kind", VMAPS)
def test_vmap_is_plain_operations(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 5, 4)
    module = lora_fx.insert(model, (x,), rank=2)
    perturb(module)
    other = torch.randn(3, 7, 4)
    want = by_hand(model, module)(other).detach()
    assert rel(module.eval()(other).detach(), want) < 1e-5
    module.train()(x).square().sum().backward()
    assert all(a.grad is not None and b.grad is not None for a, b in module.slots().values())
    assert rel(lora_fx.fold(module.eval())(other).detach(), want) < 1e-5
    assert rel(session(module, tmp_path / "m.onnx", other), want) < 1e-5
    live = lora_fx.attach(copy.deepcopy(model), (x,), adapter=module.adapter())
    assert rel(live(other).detach(), want) < 1e-5


def by_hand(model: nn.Module, module: Any) -> nn.Module:
    """A copy with W + s·BA in its parameters."""
    own = copy.deepcopy(model)
    for key, delta in module.adapter().deltas().items():
        own.get_parameter(key).data += torch.from_numpy(delta).float()
    return own


def session(module: Any, path: Path, *args: Tensor) -> Any:
    """What ONNX Runtime makes of the merged file."""
    lora_fx.export(module, path, provider="cpu")
    opened = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in opened.get_inputs()]
    return opened.run(None, {n: x.numpy() for n, x in zip(names, args, strict=True)})[0]
