"""A switchable file at rank 0 is the base model, whatever lay in the runtime's memory before.

ONNX Runtime 1.31 leaves the result of MatMul [out, 0] @ [N, 0, n] as the memory was; on 788628f
LeftOfBatch gave such numbers, and the other forms were right. (At rank 0 the runtime's Einsum of
that form ends the process; no file has it.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx.onnx import Session


class Dirty(nn.Module):
    """Fills memory of the size of the branch's result, and gives it back before the product."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))
        self.stack = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x: Tensor) -> Any:
        noise = torch.exp(x) * 100
        return self.product(x) + noise.sum((1, 2), keepdim=True) * 1e-4

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class LeftOfBatch(Dirty):
    def product(self, x: Tensor) -> Tensor:
        return self.w @ x


class LeftOfTransposed(Dirty):
    def product(self, x: Tensor) -> Tensor:
        return (self.w.t() @ x.mT).mT


class Right(Dirty):
    def product(self, x: Tensor) -> Tensor:
        return x @ self.w


class Linear(Dirty):
    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Stack(Dirty):
    def product(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.stack)


class LeftOfSquared(Dirty):
    def product(self, x: Tensor) -> Tensor:
        return self.w @ (x @ x)


class Letters(Dirty):
    def product(self, x: Tensor) -> Tensor:
        return torch.einsum("oi,bin->bon", self.w, x)


class Convolved(Dirty):
    def product(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.w[:, :, None])


class Looked(Dirty):
    def product(self, x: Tensor) -> Tensor:
        return F.embedding((x[..., 0] > 0).long(), self.w)


LEFT = [LeftOfBatch, LeftOfTransposed, LeftOfSquared, Letters, Convolved]
OTHERS = [Right, Linear, Stack, Looked]


@pytest.mark.parametrize("kind", [*LEFT, *OTHERS])
def test_no_adapter_is_the_base(kind: type[Dirty], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(3, 6, 6)
    lora_fx.export(model, tmp_path / "s.onnx", (x,), mode="switch", include="*", provider="cpu")
    session = Session(tmp_path / "s.onnx", "cpu")
    for seed in range(40):
        torch.manual_seed(seed)
        x = torch.randn(3, 6, 6)
        (got,) = session.run({"x": x.numpy()}).values()
        np.testing.assert_allclose(got, model(x).detach(), rtol=1e-4, atol=1e-4)
