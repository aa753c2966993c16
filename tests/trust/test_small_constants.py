"""A constant near 0 or 1 is not taken for it: torch's exporter drops `+ 1e-8` and `* 1.000005`.

Its rules compare to 1e-8 and to a share of 1e-5. On 18d9013 `x / (norm + 1e-8)` lost its guard: a
row of zeros was NaN in the file, which no proof saw unless an example had such a row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.onnx.session import open_session

MEMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y / (y.norm(dim=-1, keepdim=True) + 1e-8),
    "sum, the other way round": lambda y: y / (1e-9 + y.abs().sum(-1, keepdim=True)),
    "difference": lambda y: y / (y.norm(dim=-1, keepdim=True) - 1e-8),
    "product": lambda y: (y * 1.000005 - y) * 2e5,
    "quotient": lambda y: (y / 0.999995 - y) * 2e5,
}
TWINS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y * 2 + 0.0,
    "product": lambda y: y * 2 * 1.0,
}


class Net(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.end = nn.Linear(4, 6, bias=False), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.fc(x))


def exported(end: Callable[[Tensor], Tensor], path: Path, optimise: bool) -> Net:
    net = Net(end).eval()
    x = torch.randn(3, 4)
    lora_fx.export(net, path, (x,), provider="cpu", optimise=optimise)
    return net


@pytest.mark.parametrize("optimise", [False, True], ids=["plain", "optimised"])
@pytest.mark.parametrize("end", MEMBERS.values(), ids=MEMBERS)
def test_a_small_constant_stays(
    end: Callable[[Tensor], Tensor], optimise: bool, tmp_path: Path
) -> None:
    net = exported(end, tmp_path / "m.onnx", optimise)
    x = torch.randn(5, 4)
    x[1] = 0.0
    want = net(x).detach().numpy()
    (got,) = open_session(tmp_path / "m.onnx", "cpu").run({"x": x.numpy()}).values()
    np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * np.abs(want).max())
    assert np.isfinite(got).all()


@pytest.mark.parametrize("end", TWINS.values(), ids=TWINS)
def test_what_changes_nothing_goes(end: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    exported(end, tmp_path / "m.onnx", optimise=False)
    found = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
    assert found == ["Gemm", "Mul"]
