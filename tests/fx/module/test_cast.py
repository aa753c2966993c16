"""What insert returned goes on after `.to(dtype)`: it is called, saved, exported and verified.

On e646dca save and export of every one were refused: samples had the dtype of the capture.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program
from tests.fx.module.test_module import perturb


class Normed(nn.Module):
    """Floats in, a buffer beside the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        self.register_buffer("gain", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.tanh(self.norm(self.a(x))) * self.gain)
        return result


class Looked(nn.Module):
    """Ids in, no floats."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Embedding(30, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.a(torch.tanh(self.table(ids)))
        return result


class Both(nn.Module):
    """Ids, and floats in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Embedding(30, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, more: tuple[Tensor, Tensor]) -> Tensor:
        result: Tensor = self.a(torch.tanh(self.table(ids) * more[0] + more[1]))
        return result


X = torch.linspace(-2, 2, 24).view(3, 8)
IDS = torch.arange(6).view(2, 3)
CALLS: dict[type[nn.Module], tuple[Any, ...]] = {
    Normed: (X,),
    Looked: (IDS,),
    Both: (IDS, (X.view(1, 3, 8).repeat(2, 1, 1), torch.ones(2, 3, 8))),
}
DTYPES = {"bfloat16": 2e-2, "float16": 3e-3, "float64": 1e-6}


def cast(args: Any, dtype: torch.dtype) -> Any:
    to = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    return torch.utils._pytree.tree_map(to, args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CALLS)
def test_a_cast_module_is_saved_exported_and_verified(
    kind: type[nn.Module], dtype: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = lora_fx.insert(kind().eval(), CALLS[kind], rank=2)
    perturb(module)
    module.eval()
    want = module(*CALLS[kind]).detach()
    with module.base():
        assert rel(module(*CALLS[kind]).detach(), want) > 0.05
    if dtype == "float16":
        module.half()
    else:
        module.to(getattr(torch, dtype))
    given = cast(CALLS[kind], getattr(torch, dtype))
    got = module(*given).detach()
    assert got.dtype is getattr(torch, dtype)
    assert rel(got.double(), want.double()) < DTYPES[dtype]
    save_program(module, tmp_path / "m.pt2")
    again = load_program(tmp_path / "m.pt2")
    assert rel(again(*given).detach().double(), got.double()) < DTYPES[dtype]
    assert lora_fx.export(module, tmp_path / "m.onnx", provider="cpu")
    assert lora_fx.verify(module, lora_fx.fold(copy.deepcopy(module)))


def test_twins_one_that_was_cast_before_and_one_that_was_cast_back(tmp_path: Path) -> None:
    before = lora_fx.insert(Normed().bfloat16().eval(), (X.bfloat16(),), rank=2)
    save_program(before, tmp_path / "a.pt2")
    assert lora_fx.export(before, tmp_path / "a.onnx", provider="cpu")
    back = lora_fx.insert(Normed().eval(), (X,), rank=2).bfloat16().float()
    save_program(back, tmp_path / "b.pt2")
    assert lora_fx.export(back, tmp_path / "b.onnx", provider="cpu")
