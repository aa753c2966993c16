"""fold's numbers: complex weights, a weight in two slots of one node, computed weights' dtypes.

The oracle is the model's own code in fp64 (complex128) with W + ΔW where its product reads W. On
788628f: COMPLEX lost the imaginary part and said kept 1.0, the transposed twin too (`conjugate`,
`adjoint`, `as complex` and `real part` raised raw); of ADDED `addmm`, `one view` and `baddbmm` were
folded in both slots, the others were right; DTYPE raised raw or were cut to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import lora_fx
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import ORT_TOL, rel

C = torch.complex64
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """run(parameters, x, change): the model's code, with a change of what its product reads."""

    parameters: Callable[[], Parameters]
    run: Callable[[Any, Tensor, Tensor | None], Tensor]
    tol: float = ORT_TOL
    rows: int = 4


def whole(dtype: torch.dtype = C, *shape: int) -> Callable[[], Parameters]:
    return lambda: {"w": torch.randn(*(shape or (8, 8)), dtype=dtype)}


def plus(w: Tensor, change: Tensor | None) -> Tensor:
    return w if change is None else w + change


def up(x: Tensor, like: Tensor) -> Tensor:
    """x as complex, as wide as the weight."""
    return x.to(like.dtype)


def pairs(y: Tensor) -> Tensor:
    return torch.view_as_real(y)


def one_view(p: Any, x: Tensor, d: Tensor | None) -> Tensor:
    t = p.w.t()
    return torch.addmm(t, x, t if d is None else (p.w + d).t())


COMPLEX = {
    "matmul": Case(whole(), lambda p, x, d: pairs(up(x, p.w) @ plus(p.w, d))),
    "linear": Case(whole(), lambda p, x, d: pairs(F.linear(up(x, p.w), plus(p.w, d)))),
    "einsum": Case(
        whole(C, 6, 8), lambda p, x, d: pairs(torch.einsum("bi,oi->bo", up(x, p.w), plus(p.w, d)))
    ),
    "wide": Case(
        whole(torch.complex128), lambda p, x, d: (up(x, p.w) @ plus(p.w, d)).abs(), tol=1e-6
    ),
    "conjugate": Case(whole(), lambda p, x, d: pairs(up(x, p.w) @ plus(p.w.conj(), d))),
    "adjoint": Case(whole(C, 6, 8), lambda p, x, d: pairs(up(x, p.w) @ plus(p.w.mH, d))),
    "H": Case(whole(C, 6, 8), lambda p, x, d: pairs(up(x, p.w) @ plus(p.w.H, d))),
    "as complex": Case(
        whole(torch.float32, 8, 6, 2),
        lambda p, x, d: pairs(x * (1 + 0j) @ plus(torch.view_as_complex(p.w), d)),
    ),
    "real part": Case(whole(C, 8, 6), lambda p, x, d: x @ plus(p.w.real, d)),
    "twin: transposed": Case(whole(C, 6, 8), lambda p, x, d: pairs(up(x, p.w) @ plus(p.w, d).mT)),
    "twin: real weight": Case(
        whole(torch.float32), lambda p, x, d: (x * (1 + 1j)).abs() @ plus(p.w, d)
    ),
}
ADDED = {
    "addmm": Case(
        whole(torch.float32, 3, 8), lambda p, x, d: torch.addmm(p.w, x[:3, :3], plus(p.w, d))
    ),
    "addmm of views": Case(
        whole(torch.float32), lambda p, x, d: torch.addmm(p.w.t(), x, plus(p.w, d).t()), rows=8
    ),
    "one view": Case(whole(torch.float32), one_view, rows=8),
    "baddbmm": Case(
        whole(torch.float32, 2, 8, 8),
        lambda p, x, d: torch.baddbmm(p.w, torch.stack([x, x]), plus(p.w, d)),
        rows=8,
    ),
    "bias": Case(whole(torch.float32), lambda p, x, d: F.linear(x, plus(p.w, d), p.w[0])),
    "bilinear": Case(
        whole(torch.float32, 5, 8, 8),
        lambda p, x, d: F.bilinear(x, x, plus(p.w, d), p.w[:, 0, 0].contiguous()),
    ),
    "weights of a bag": Case(
        whole(torch.float32),
        lambda p, x, d: F.embedding_bag(
            (x > 0).long(), plus(p.w, d), per_sample_weights=p.w[:4], mode="sum"
        ),
    ),
    "twin: two nodes": Case(
        whole(torch.float32), lambda p, x, d: torch.addmm(x @ plus(p.w, d), x, plus(p.w, d))
    ),
    "twin: another bias": Case(
        lambda: {"b": torch.randn(8), "w": torch.randn(8, 8)},
        lambda p, x, d: torch.addmm(p.b, x, plus(p.w, d)),
    ),
}
B16, F64 = torch.bfloat16, torch.float64


def to(w: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast of the model; the oracle, in fp64, does without."""
    return w if w.dtype == F64 else w.to(dtype)


DTYPE = {
    "computed in bf16": Case(
        whole(torch.float32),
        lambda p, x, d: to(to(x, B16) @ plus(torch.tril(to(p.w, B16)), d), x.dtype),
        tol=2e-2,
    ),
    "computed in fp64": Case(
        whole(torch.float32), lambda p, x, d: x.double() @ plus(torch.tril(p.w.double()), d)
    ),
    "stored in bf16": Case(
        whole(B16), lambda p, x, d: F.linear(x, plus(to(p.w, torch.float32) * 2.0, d))
    ),
    "stored in half": Case(
        whole(torch.float16),
        lambda p, x, d: F.linear(x, plus(F.normalize(to(p.w, torch.float32), dim=1), d)),
    ),
    "codes first": Case(
        lambda: {"codes": torch.randint(-9, 9, (8, 8), dtype=torch.int8), "w": torch.rand(8, 1)},
        lambda p, x, d: F.linear(x, plus(p.codes.to(x.dtype) * p.w, d)),
    ),
    "twin: one dtype": Case(whole(torch.float32), lambda p, x, d: x @ plus(torch.tril(p.w), d)),
    "twin: a cast alone": Case(whole(B16), lambda p, x, d: x @ to(plus(p.w, d), x.dtype), tol=2e-2),
}


class Wide:
    """The parameters of a model in fp64 or complex128; codes as they are."""

    def __init__(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            wide = torch.complex128 if p.is_complex() else F64
            setattr(self, name, p.detach() if p.dtype == torch.int8 else p.detach().to(wide))


def model_of(case: Case) -> tuple[Any, Tensor]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in case.parameters().items():
                trains = value.is_floating_point() or value.is_complex()
                setattr(self, name, nn.Parameter(value, requires_grad=trains))

        def forward(self, x: Tensor) -> Tensor:
            return case.run(self, x, None)

    torch.manual_seed(0)
    return Net().eval(), torch.randn(case.rows, 8)


@pytest.mark.parametrize(
    ("table", "name"),
    [(t, n) for t, rows in (("C", COMPLEX), ("A", ADDED), ("D", DTYPE)) for n in rows],
)
def test_fold_is_the_weight_with_its_update(table: str, name: str) -> None:
    case = {"C": COMPLEX, "A": ADDED, "D": DTYPE}[table][name]
    model, x = model_of(case)
    module = lora_fx.insert(model, (x,), rank=2, include="*", dead="allow")
    updates = {}
    for key, u in module.updates.items():
        a, b = draw(key, u.layout, u.rank, 0, "probe")
        updates[key] = replace(u, a=a, b=b)
    module.load_adapter(lora_fx.Adapter(updates))
    (delta,) = module.adapter().deltas().values()
    with torch.no_grad():
        want = case.run(Wide(model), x.double(), torch.from_numpy(delta))
    base = np.asarray(model(x).detach())
    assert 0.02 < rel(np.asarray(want), base) < 50
    assert rel(np.asarray(module(x).detach()), np.asarray(want)) < case.tol
    folded = lora_fx.fold(module)
    assert rel(np.asarray(folded(x).detach()), np.asarray(want)) < case.tol
    assert all(f.kept > 0.9 for f in folded.folded)


def test_onnx_a_gemm_that_adds_its_own_weight(tmp_path: Path) -> None:
    """It was right before: a slot of a node is told apart there."""
    w = np.random.default_rng(0).standard_normal((8, 8)).astype("f4")
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Gemm", ["x", "w", "w"], ["y"], transB=1),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("Gemm", ["y", "t", "t"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, [8, 8])],
        [info("z", TensorProto.FLOAT, [8, 8])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "b.onnx")
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 8)).astype("f4"), rng.standard_normal((8, 2)).astype("f4")
    adapter = lora_fx.Adapter({"w": lora_fx.LowRank(a, b, 2.0)})
    lora_fx.merge(tmp_path / "b.onnx", adapter, tmp_path / "m.onnx")
    x = rng.standard_normal((8, 8)).astype("f4")
    opened = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (got,) = opened.run(None, {"x": x})
    old = w.astype("f8")
    new = old + b.astype("f8") @ a
    assert rel(got, (x @ new.T + old) @ new.T + old.T) < ORT_TOL
