"""What a weight makes with constants stays a node of the file: an update of it reaches all uses.

On e646dca torch's exporter computed it, for weights of up to 8,192 elements. A merge into the file,
a switch or a load of it left the constant as it was, without a word (rel .08 to .57), for every
member but `both ways`, which was refused; mode switch of the model itself was refused for most.
Small weights of equal values were stored once, so an update of one was an update of the others.
The twins were right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.compare import ORT_TOL, rel
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.names import FOLDED_FROM
from lora_fx.onnx.session import open_session
from tests.trust.tied import values

Run = Callable[[Any, Tensor, Tensor], Tensor]
"""f(the model's constants, u [6, 4] or what has its place, x [3, 4])"""


def _equal(m: Any, u: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, u) + 2.0 * F.linear(x * x, m.same)


MEMBERS: dict[str, Run] = {
    "lookup": lambda m, u, x: F.linear(x, u)[:, :4] + F.embedding(m.ids, u),
    "positions": lambda m, u, x: F.linear(x, u)[:, :4] + F.embedding(torch.arange(3), u),
    "one row": lambda m, u, x: F.linear(x, u)[:, :4] + F.embedding(torch.tensor(3), u),
    "rows of a part": lambda m, u, x: F.linear(x, u)[:, :4] + F.embedding(m.ids % 3, u[1:5]),
    "rows of the turned": lambda m, u, x: (
        F.linear(x, u)[:, :4] + F.embedding(m.ids % 4, u.t())[:, :4]
    ),
    "sum of rows and a constant": lambda m, u, x: (
        F.linear(x, u)[:, :4] + F.embedding(m.ids, u) * 2 + m.z
    ),
    "product": lambda m, u, x: F.linear(x, u) + F.linear(m.z, u),
    "convolution": lambda m, u, x: F.linear(x, u) + F.conv1d(m.z[None], u[:, :3, None])[0].mean(1),
    "cut rows": lambda m, u, x: F.linear(x, u)[:, :4] + F.linear(x, u[1:5]),
    "cut columns": lambda m, u, x: F.linear(x, u) + F.linear(x[:, :2], u[:, 1:3]),
    "both ways": lambda m, u, x: F.linear(F.linear(x, u), u.t()),
    "both ways, square": lambda m, u, x: (x @ m.q) @ m.q.t(),
    "equal weights": _equal,
}
TWINS: dict[str, Run] = {
    "ids of the data": lambda m, u, x: F.linear(x, u)[:, :4] + F.embedding((x[:, 0] > 0).long(), u),
    "another table": lambda m, u, x: F.linear(x, u)[:, :4] + F.embedding(m.ids, m.table),
    "a buffer": lambda m, u, x: F.linear(F.linear(x, u), m.w),
}
READERS: dict[str, Run] = {
    "picked by an index": lambda m, u, x: F.linear(x, u)[:, :4] + u.detach().clone()[m.ids],
    "a norm": lambda m, u, x: F.linear(x, u) / u.norm(),
}


class Net(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(6, 4))
        self.same = nn.Parameter(self.u.detach().clone())
        self.q = nn.Parameter(torch.randn(4, 4))
        self.table = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("ids", torch.tensor([0, 2, 5]), persistent=False)
        self.register_buffer("z", torch.randn(3, 4))
        self.register_buffer("w", torch.randn(5, 6))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.u, x)


def made(run: Run) -> tuple[Net, Tensor, lora_fx.Adapter, Any]:
    """A model, x, an adapter of u, and what the model's own code gives with W + ΔW."""
    torch.manual_seed(0)
    model, x = Net(run).eval(), torch.randn(3, 4)
    adapter = values(lora_fx.insert(model, (x,), rank=2, include="re:^[uq]$").updates)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for key, delta in adapter.deltas().items():
            getattr(other, key).add_(torch.from_numpy(delta).float())
        want = other(x).numpy()
        assert rel(model(x), want) > 0.05
    return model, x, adapter, want


def ran(path: Path, x: Tensor) -> Any:
    return open_session(path, "cpu").run({"x": x.numpy()})["output"]


@pytest.mark.parametrize("name", [*MEMBERS, *TWINS])
def test_a_merge_into_an_exported_file_reaches_all_uses(name: str, tmp_path: Path) -> None:
    model, x, adapter, want = made({**MEMBERS, **TWINS}[name])
    lora_fx.export(model, tmp_path / "b.onnx", (x,), provider="cpu")
    report = lora_fx.merge(tmp_path / "b.onnx", adapter, tmp_path / "m.onnx")
    assert rel(ran(tmp_path / "m.onnx", x), want) < ORT_TOL
    assert not any("may be computed" in w for w in report.warnings)


@pytest.mark.parametrize("name", ["lookup", "rows of a part", "product", "both ways, square"])
def test_switch_and_load_do_too(name: str, tmp_path: Path) -> None:
    model, x, adapter, want = made(MEMBERS[name])
    lora_fx.export(
        model, tmp_path / "s.onnx", (x,), mode="switch", adapters={"s": adapter}, provider="cpu"
    )
    lora_fx.export(model, tmp_path / "b.onnx", (x,), provider="cpu", optimise=name == "product")
    lora_fx.export(
        tmp_path / "b.onnx",
        tmp_path / "l.onnx",
        mode="load",
        adapters={"l": adapter},
        provider="cpu",
    )
    opened = Session(tmp_path / "s.onnx", "cpu")
    opened.load("a", adapter)
    assert rel(opened.run({"x": x.numpy()}, "a")["output"], want) < ORT_TOL
    opened = Session(tmp_path / "l.onnx", "cpu", adapter=adapter)
    assert rel(opened.run({"x": x.numpy()})["output"], want) < ORT_TOL


@pytest.mark.parametrize("name", READERS)
def test_readers_keep_what_they_read(name: str, tmp_path: Path) -> None:
    model, x, adapter, _ = made(READERS[name])
    want = lora_fx.insert(model, (x,), adapter=adapter)(x).detach()
    lora_fx.export(model, tmp_path / "b.onnx", (x,), provider="cpu")
    lora_fx.merge(tmp_path / "b.onnx", adapter, tmp_path / "m.onnx")
    assert rel(ran(tmp_path / "m.onnx", x), want) < ORT_TOL


FOREIGN: dict[str, Callable[[Any], Any]] = {
    "rows": lambda u: u[[0, 2, 5]],
    "a row": lambda u: u[1],
    "columns": lambda u: np.ascontiguousarray(u.T[:2]),
    "turned": lambda u: np.ascontiguousarray(u.T),
    "a part": lambda u: u[2:4],
}
TOLD: dict[str, Callable[[Any], Any]] = {"sum": lambda u: u.sum(1), "twice": lambda u: 2 * u}
APART: dict[str, Callable[[Any], Any]] = {
    "zeros": lambda u: np.zeros((3, 4), "f4"),
    "another": lambda u: u + np.float32(1),
}


@pytest.mark.parametrize("name", [*FOREIGN, *TOLD, *APART])
def test_of_a_constant_that_another_exporter_computed_is_said(name: str, tmp_path: Path) -> None:
    """Its rows tell, or torch's metadata does."""
    u = np.random.default_rng(0).standard_normal((6, 4)).astype("f4")
    constant = {**FOREIGN, **TOLD, **APART}[name](u)
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [node("MatMul", ["x", "w"], ["y"]), node("Identity", ["c"], ["z"])],
        "g",
        [info("x", 1, ["n", 6])],
        [info("y", 1, ["n", 4]), info("z", 1, list(constant.shape))],
        [onnx.numpy_helper.from_array(u, "w"), onnx.numpy_helper.from_array(constant, "c")],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    file = ir.serde.deserialize_model(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    )
    if name in TOLD:
        file.graph.initializers["c"].metadata_props[FOLDED_FROM] = str(["ids", "w"])
    ir.save(file, tmp_path / "b.onnx")
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 6)).astype("f4"), rng.standard_normal((4, 2)).astype("f4")
    adapter = lora_fx.Adapter({"w": lora_fx.LowRank(a, b, 2.0)})
    report = lora_fx.merge(tmp_path / "b.onnx", adapter, tmp_path / "m.onnx")
    said = [w for w in report.warnings if "'c' may be computed from 'w'" in w]
    assert len(said) == (name not in APART)
