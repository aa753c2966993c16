"""A weight that is also read by no product: what reads it is said, kept and not changed unasked.

On 788628f nothing named the readers of any member: insert and fold left them alone, and a merge
into a checkpoint changed what every one of them read, without a word and verified.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

import lora_fx
from lora_fx import cli
from lora_fx.adapter.adapter import mix
from lora_fx.compare import FOLD_TOL, ORT_TOL, rel
from lora_fx.errors import LoraFxError
from tests.trust.tied import values


def main(argv: list[str]) -> Any:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    return ended.value.code


Run = Callable[[Any, Tensor, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Reader:
    """f(model, w at its product, w at its other readers, x), and what find calls these."""

    run: Run
    said: tuple[str, ...]


def _index(m: Any, w: Tensor, r: Tensor, x: Tensor) -> Any:
    return x @ w, r[torch.tensor([1, 4])]


READERS = {
    "index": Reader(_index, ("index",)),
    "norm": Reader(lambda m, w, r, x: x @ w / r.norm(), ("linalg_vector_norm",)),
    "penalty": Reader(lambda m, w, r, x: (x @ w, (r**2).sum()), ("pow",)),
    "sum": Reader(lambda m, w, r, x: F.linear(x, w) + r.sum(1), ("sum",)),
    "returned": Reader(lambda m, w, r, x: (x @ w, r), ("the output",)),
    "through a view": Reader(lambda m, w, r, x: x @ w.t() + r.t().contiguous()[0], ("add",)),
    "element": Reader(lambda m, w, r, x: x @ w * r[0, 0], ("mul",)),
    "bias": Reader(lambda m, w, r, x: F.linear(x, w, r[0]), ("linear",)),
    "a vector of it": Reader(lambda m, w, r, x: (x @ w, F.linear(x, r[0])), ("linear",)),
    "computed": Reader(lambda m, w, r, x: (x @ w, x @ torch.tril(r)), ("tril",)),
    "two": Reader(lambda m, w, r, x: (x @ w * r.amax(), r.mean()), ("amax", "mean")),
    "overlapping part": Reader(
        lambda m, w, r, x: (x @ w[:, :4], r[:, 2:].norm()), ("linalg_vector_norm",)
    ),
    "in a branch": Reader(
        lambda m, w, r, x: torch.cond(
            x.sum() > 0, lambda x: x @ w, lambda x: x @ w + r.norm(), (x,)
        ),
        ("linalg_vector_norm",),
    ),
}
TWINS: dict[str, Run] = {
    "shape": lambda m, w, r, x: x @ w * r.shape[0] ** -0.5 + torch.zeros_like(r)[0],
    "dtype": lambda m, w, r, x: (x.to(r) @ w).view_as(x) + x.new_ones(8).type_as(r),
    "dead": lambda m, w, r, x: (r.norm(), x @ w)[1],
    "other part": lambda m, w, r, x: (x @ w[:, :4], r[:, 4:].norm()),
    "two products": lambda m, w, r, x: x @ w + F.linear(x, w),
    "in a branch": lambda m, w, r, x: torch.cond(
        x.sum() > 0, lambda x: x @ w, lambda x: x @ w * 2.0, (x,)
    ),
}


def model_of(run: Run) -> tuple[Any, Tensor]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Any:
            return run(self, self.w, self.w, x)

    torch.manual_seed(0)
    return Net().eval(), torch.randn(3, 8)


def arrays(out: Any) -> list[np.ndarray[Any, Any]]:
    outs = out if isinstance(out, (tuple, list)) else (out,)
    return [np.asarray(o.detach().double()) for o in outs]


def near(got: Any, want: Any, tol: float) -> None:
    for a, b in zip(arrays(got), arrays(want), strict=True):
        assert rel(a, b) < tol


def change(adapter: lora_fx.Adapter, shape: tuple[int, ...]) -> Tensor:
    """ΔW of all keys in the stored shape."""
    total = torch.zeros(shape, dtype=torch.float64)
    for key, d in adapter.deltas().items():
        where = total[:, :4] if "[" in key else total
        where += torch.from_numpy(d)
    return total


def adapted(run: Run) -> tuple[Any, Tensor, Any]:
    model, x = model_of(run)
    module = lora_fx.insert(model, (x,), rank=2, include="w*")
    kept = {k: u for k, u in values(module.updates).lowrank.items() if not k.endswith("~")}
    module = lora_fx.insert(model, (x,), adapter=lora_fx.Adapter(kept))
    return model, x, module


@pytest.mark.parametrize("name", READERS)
def test_what_reads_it_is_said_and_left_alone(name: str, tmp_path: Path) -> None:
    case = READERS[name]
    model, x, module = adapted(case.run)
    found = lora_fx.find(model, (x,))
    (key,) = module.updates
    assert found[key].other_readers == case.said
    assert f"also read: {key}: read by {', '.join(case.said)} too" in str(found)
    row = next(t for t in found.to_json()["targets"] if t["key"] == key)
    assert row["other_readers"] == list(case.said)
    assert any("where the update does not apply" in n for n in module.report().notes)
    adapter = module.adapter()
    wide = model.w.detach().double()
    want = case.run(model, wide + change(adapter, (8, 8)), wide, x.double())
    near(module(x), want, ORT_TOL)
    folded = lora_fx.fold(module)
    near(folded(x), want, ORT_TOL)
    assert [f.other_readers for f in folded.folded] == [case.said]

    lora_fx.save_adapter(adapter, tmp_path / "adapter")
    save_file({"w": model.w.detach()}, tmp_path / "base.safetensors")
    argv = ["merge", str(tmp_path / "base.safetensors"), str(tmp_path / "adapter")]
    argv += ["-o", str(tmp_path / "merged.safetensors")]
    assert main(argv) == 2 and not (tmp_path / "merged.safetensors").exists()
    read = lora_fx.load_adapter(tmp_path / "adapter")
    assert read.metadata["other_readers"] == {key: list(case.said)}
    with pytest.raises(LoraFxError, match="which also reads the tensor") as caught:
        lora_fx.merge(tmp_path / "base.safetensors", read, tmp_path / "merged.safetensors")
    assert "--other-readers" in caught.value.hint
    assert main([*argv, "--other-readers"]) == 0
    merged = load_file(tmp_path / "merged.safetensors")["w"]
    assert rel(merged.numpy(), (wide + change(adapter, (8, 8))).numpy()) < FOLD_TOL
    report = lora_fx.verify(
        tmp_path / "merged.safetensors", tmp_path / "base.safetensors", adapter=read
    )
    assert report and any("but the merged tensor changes that too" in w for w in report.warnings)


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_merged(name: str, tmp_path: Path) -> None:
    model, x, module = adapted(TWINS[name])
    assert not any(t.other_readers for t in lora_fx.find(model, (x,)).targets)
    assert "other_readers" not in module.adapter().metadata
    save_file({"w": model.w.detach()}, tmp_path / "base.safetensors")
    lora_fx.merge(tmp_path / "base.safetensors", module.adapter(), tmp_path / "m.safetensors")
    merged = load_file(tmp_path / "m.safetensors")
    if name != "other part":
        near(functional_call(model, merged, (x,)), module(x), ORT_TOL)


@pytest.mark.parametrize("name", ["index", "norm", "returned", "sum"])
def test_a_live_model_is_refused(name: str) -> None:
    """Its attribute would give every reader the update."""
    model, x, module = adapted(READERS[name].run)
    adapter = module.adapter()
    with pytest.raises(LoraFxError, match=r"differs|does not run|read by \w+ too"):
        lora_fx.attach(model, (x,), adapter=adapter)


LIVE: dict[str, Callable[[Any, Tensor], Any]] = {
    "read by F.linear too": lambda m, x: F.linear(m.lin(x) + m.lin.weight.norm(), m.lin.weight),
    "turned": lambda m, x: m.lin(x) @ m.lin.weight + m.lin.weight.abs().mean(),
    "no module of its own": lambda m, x: m.own(x) @ m.w + m.w.sum(0),
}


@pytest.mark.parametrize("name", LIVE)
def test_the_default_plan_of_attach_leaves_out_what_it_cannot_tell_apart(name: str) -> None:
    """On 3911131 attach refused these models, which no option named (fuzz seeds 60002, 60252)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.lin = nn.Linear(8, 8), nn.Linear(8, 8)
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Any:
            return LIVE[name](self, self.own(x))

    torch.manual_seed(0)
    model, x, key = Net().eval(), torch.randn(3, 8), "w" if "no" in name else "lin.weight"
    assert key in lora_fx.insert(model, (x,), rank=2).updates
    lora_fx.attach(model, (x,), rank=2)
    (note,) = (n for n in model.report().notes if "left out" in n)
    assert note.startswith(f"{key}: read by ") and "lora_fx.insert can adapt it" in note
    adapter = values(model.adapter().lowrank)
    assert key not in adapter.entries and "own.weight" in adapter.entries
    model.load_adapter(adapter)
    near(model(x), lora_fx.fold(lora_fx.detach(model), (x,), adapter=adapter)(x), ORT_TOL)
    refused = f"^{key}: read by .* too, where the update does not apply"
    for asked in ({"include": key}, {"plan": {key: 2}}):
        with pytest.raises(LoraFxError, match=refused):
            lora_fx.attach(model, (x,), **asked)


def test_a_live_layer_keeps_its_reader() -> None:
    model, x, module = adapted(READERS["bias"].run)
    lora_fx.attach(model, (x,), adapter=module.adapter())  # the root's forward is that op alone
    near(model(x), module(x), ORT_TOL)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            return self.lin(x), self.lin.weight.abs().mean()

    model, x = Net().eval(), torch.randn(3, 8)
    module = lora_fx.insert(model, (x,), rank=2)
    adapter = values(module.updates)
    module.load_adapter(adapter)
    lora_fx.attach(model, (x,), adapter=adapter)
    near(model(x), module(x), ORT_TOL)
    assert any("read by abs too" in n for n in model.report().notes)
    assert model.adapter().metadata["other_readers"] == {"lin.weight": ["abs"]}


def test_what_carries_an_adapter_carries_its_readers(tmp_path: Path) -> None:
    _, _, module = adapted(READERS["norm"].run)
    adapter = module.adapter()
    want = {"w": ["linalg_vector_norm"]}
    assert mix([(adapter, 0.5), (adapter, 0.5)]).metadata["other_readers"] == want
    assert lora_fx.truncate(adapter, energy=0.9).metadata["other_readers"] == want
    from lora_fx.passes.verbs.open import load_program
    from lora_fx.passes.verbs.program import save_program

    save_program(module, tmp_path / "m.pt2")
    assert load_program(tmp_path / "m.pt2").adapter().metadata["other_readers"] == want


def graph(nodes: Any, outputs: Any, path: Path) -> Path:
    w = np.random.default_rng(0).standard_normal((8, 8)).astype("f4")
    info = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", 8])],
        [info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array([1, 4]), "i")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


node = helper.make_node
ONNX = {
    "Gather": ([node("Gather", ["w", "i"], ["z"], axis=1)], ["y", "z"]),
    "ReduceL2": ([node("ReduceL2", ["w"], ["z"])], ["y", "z"]),
    "Mul": ([node("Mul", ["w", "w"], ["q"]), node("ReduceSum", ["q"], ["z"])], ["y", "z"]),
    "the output": ([], ["y", "w"]),
    "Add": ([node("Transpose", ["w"], ["t"]), node("Add", ["y", "t"], ["z"])], ["z"]),
}


ONNX_TWINS = {
    "its shape": (
        [node("Shape", ["w"], ["s"]), node("Cast", ["s"], ["z"], to=TensorProto.FLOAT)],
        ["y", "z"],
    ),
    "a second product": ([node("MatMul", ["y", "w"], ["z"])], ["y", "z"]),
    "another tensor": ([node("Cast", ["i"], ["z"], to=TensorProto.FLOAT)], ["y", "z"]),
}


@pytest.mark.parametrize("name", ONNX_TWINS)
def test_onnx_twins_are_merged_without_a_word(name: str, tmp_path: Path) -> None:
    nodes, outputs = ONNX_TWINS[name]
    base = graph([node("MatMul", ["x", "w"], ["y"]), *nodes], outputs, tmp_path / "b.onnx")
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 8)).astype("f4"), rng.standard_normal((8, 2)).astype("f4")
    report = lora_fx.merge(
        base, lora_fx.Adapter({"w": lora_fx.LowRank(a, b, 2.0)}), tmp_path / "m.onnx"
    )
    assert not any("read by" in w for w in report.warnings)
    x = rng.standard_normal((8, 8)).astype("f4")
    opened = [
        onnxruntime.InferenceSession(p, providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]
        for p in (base, tmp_path / "m.onnx")
    ]
    assert rel(opened[1], opened[0] + x.astype("f8") @ (b.astype("f8") @ a).T) < ORT_TOL


@pytest.mark.parametrize("name", ONNX)
def test_onnx_files_keep_the_readers_constant(name: str, tmp_path: Path) -> None:
    nodes, outputs = ONNX[name]
    base = graph([node("MatMul", ["x", "w"], ["y"]), *nodes], outputs, tmp_path / "b.onnx")
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 8)).astype("f4"), rng.standard_normal((8, 2)).astype("f4")
    adapter = lora_fx.Adapter({"w": lora_fx.LowRank(a, b, 2.0)})
    report = lora_fx.merge(base, adapter, tmp_path / "m.onnx")
    assert any(f"read by {name} too" in w for w in report.warnings)
    x = rng.standard_normal((8, 8)).astype("f4")

    def run(path: Path) -> list[Any]:
        opened = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return opened.run(None, {"x": x})

    before, after = run(base), run(tmp_path / "m.onnx")
    move = x.astype("f8") @ (b.astype("f8") @ a).T
    assert rel(after[0], before[0] + move) < ORT_TOL
    for old, new in zip(before[1:], after[1:], strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_onnx_file_says_them_and_its_branches_remember(tmp_path: Path, capsys: Any) -> None:
    nodes, outputs = ONNX["ReduceL2"]
    base = graph([node("MatMul", ["x", "w"], ["y"]), *nodes], outputs, tmp_path / "b.onnx")
    assert main(["targets", str(base), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["targets"][0]["other_readers"] == ["ReduceL2"]
    argv = ["insert", str(base), "-o", str(tmp_path / "i.onnx"), "--rank", "2", "--json"]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert any("read by ReduceL2 too" in w for w in said["warnings"])
    read = lora_fx.load_adapter(tmp_path / "i.onnx")
    assert read.metadata["other_readers"] == {"w": ["ReduceL2"]}
