"""Portable files: A and B are required inputs, operators are ONNX's own, the rest is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from safetensors.numpy import load_file
from torch import nn

import lora_fx
from lora_fx.compare import ORT_TOL, rel
from lora_fx.errors import LoraFxError
from lora_fx.onnx import Session
from lora_fx.onnx.consumers import NEWEST_IR, NEWEST_OPSET, require_portable
from lora_fx.onnx.made_for import PROPERTY
from lora_fx.onnx.manifest import PROPERTY as MANIFEST
from lora_fx.onnx.manifest import manifest_of
from lora_fx.onnx.rewrites.guard_lookups import GuardLookups
from lora_fx.passes.verbs.verify import verify
from tests.onnx.test_batch import adapter

ROWS = 11
IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


class Net(nn.Module):
    """A lookup, a convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, 6)
        self.inner = nn.Linear(6, 8)
        self.conv = nn.Conv1d(8, 5, 3, padding=1)
        self.head = nn.Linear(5, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.inner(self.table(ids)))
        return self.head(torch.relu(self.conv(h.mT)).mT)


INCLUDE = ["table", "inner", "conv", "head"]


def exported(path: Path, **options: Any) -> Path:
    options = {"mode": "switch", "target": "portable", "provider": "cpu", **options}
    lora_fx.export(Net().eval(), path, (IDS,), **options)
    return path


def operators(path: Path) -> set[str]:
    """The domains of all nodes and imports."""
    model = onnx.load(path)
    return {n.domain for n in model.graph.node} | {i.domain for i in model.opset_import}


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portable file with adapters a and b beside it."""
    captured = lora_fx.capture(Net().eval(), (IDS,))
    adapters = {"a": adapter(captured, 1, 2, INCLUDE), "b": adapter(captured, 2, 3, INCLUDE)}
    folder = tmp_path_factory.mktemp("switch")
    return exported(folder / "m.onnx", adapters=adapters)


def test_a_and_b_are_required_inputs(switch: Path) -> None:
    model = onnx.load(switch)
    manifest = manifest_of(switch)
    names = {name for slot in manifest.slots.values() for name in (slot.a, slot.b)}
    assert manifest.required and len(names) == 8
    assert names < {value.name for value in model.graph.input}
    assert not names & {tensor.name for tensor in model.graph.initializer}
    assert operators(switch) == {""}
    assert {entry.key: entry.value for entry in model.metadata_props}[PROPERTY] == "portable"


def test_any_runtime_takes_the_files_beside_it(switch: Path) -> None:
    """What ONNX Runtime gives without our session is what it gives in it, and is torch's."""
    plain = ort.InferenceSession(switch, providers=["CPUExecutionProvider"])
    session = Session(switch, "cpu")
    captured = lora_fx.capture(Net().eval(), (IDS,))
    for which, rank in (("a", 2), ("b", 3)):
        path = switch.with_name(f"{which}.safetensors")
        session.load(which, lora_fx.load_adapter(path))
        (ours,) = session.run({"ids": IDS.numpy()}, which).values()
        (same,) = plain.run(None, {"ids": IDS.numpy(), **load_file(path)})
        number = 1 + "ab".index(which)
        folded = lora_fx.fold(captured, adapter=adapter(captured, number, rank, INCLUDE))
        expected = folded(IDS).detach().numpy()
        assert rel(ours, expected) <= ORT_TOL and rel(same, expected) <= ORT_TOL
    zeros = load_file(switch.with_name("m.base.safetensors"))
    (base,) = plain.run(None, {"ids": IDS.numpy(), **zeros})
    (ours,) = session.run({"ids": IDS.numpy()}).values()
    assert rel(base, Net()(IDS).detach().numpy()) <= ORT_TOL and rel(ours, base) <= ORT_TOL
    (mixed,) = session.run({"ids": IDS.numpy()}, {"a": 1.0, "b": 0.0}).values()
    (alone,) = session.run({"ids": IDS.numpy()}, "a").values()
    assert rel(mixed, alone) <= ORT_TOL and rel(alone, base) > 0.05


def test_commands_run_the_base_of_it(switch: Path, tmp_path: Path) -> None:
    merged = exported(tmp_path / "base.onnx", mode="merged")
    assert verify(switch, merged) and verify(merged, switch)
    assert lora_fx.export(switch, tmp_path / "o.onnx", optimise=True, target="portable")
    assert manifest_of(tmp_path / "o.onnx") == manifest_of(switch)


def drop_metadata(model: onnx.ModelProto) -> None:
    kept = [entry for entry in model.metadata_props if entry.key != MANIFEST]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def fold(*numbers: int) -> Callable[[onnx.ModelProto], None]:
    """Make constants of some of A and B, as a simplifier does with defaults."""

    def change(model: onnx.ModelProto) -> None:
        slots = [value for value in model.graph.input if ".lora_" in value.name]
        stored = {tensor.name for tensor in model.graph.initializer}
        for number in numbers:
            value = slots[number]
            model.graph.input.remove(value)
            sizes = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
            if value.name not in stored:
                zeros = onnx.numpy_helper.from_array(np.zeros(sizes, np.float32), value.name)
                model.graph.initializer.append(zeros)

    return change


def give_default(model: onnx.ModelProto) -> None:
    fold(2)(model)
    value = model.graph.initializer[-1]
    dims = [*value.dims]
    model.graph.input.append(helper.make_tensor_value_info(value.name, 1, dims))


def drop_defaults(most: int) -> Callable[[onnx.ModelProto], None]:
    """Make required inputs of some of A and B that had defaults."""

    def change(model: onnx.ModelProto) -> None:
        stored = [tensor for tensor in model.graph.initializer if ".lora_" in tensor.name]
        for tensor in stored[:most]:
            model.graph.initializer.remove(tensor)

    return change


CHANGES: dict[str, tuple[str, Callable[[onnx.ModelProto], None], str]] = {
    "no metadata": ("portable", drop_metadata, "it has no manifest of lora-fx"),
    "all folded": ("portable", fold(*range(8)), "the graph has no 'table.weight.lora_A'"),
    "one folded": ("portable", fold(3), "the graph has no 'inner.weight.lora_B'"),
    "a default": ("portable", give_default, "the graph has no 'inner.weight.lora_A'"),
    "all of the CPU's folded": ("cpu", fold(*range(8)), "the graph has no 'table.weight.lora_A'"),
    "one of the CPU's folded": ("cpu", fold(5), "the graph has no 'conv.weight.lora_B'"),
    "no defaults": ("cpu", drop_defaults(8), "the graph has no 'table.weight.lora_A'"),
    "few defaults": ("cpu", drop_defaults(1), "the graph has no '.*lora_A'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_another_program_took_away_is_found(name: str, tmp_path: Path) -> None:
    target, change, message = CHANGES[name]
    path = exported(tmp_path / "m.onnx", mode=lora_fx.Switch(include=INCLUDE), target=target)
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    for opened in (lambda: Session(path, "cpu"), lambda: manifest_of(path)):
        with pytest.raises(LoraFxError, match=message):
            opened()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "load": ({"mode": "load"}, "mode load is not portable: only ONNX Runtime exchanges"),
    "bfloat16": ({"mode": "merged", "precision": "bfloat16"}, "bfloat16 is not portable"),
    "level 4": ({"accuracy_level": 4}, "an accuracy level is not portable: .* MatMulNBits"),
    "codes": ({"quantise": "int4"}, "quantise is not portable: .* MatMulNBits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_onnx_runtime_has_is_refused(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(LoraFxError, match=message):
        exported(tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


def graph_of(body: str, header: str = "") -> ir.Model:
    header = header or '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
    return ir.from_proto(onnx.parser.parse_model(f"{header} m {body}"))


UNPORTABLE = {
    "an operator": (
        "(float[n] x) => (float[n] y) { y = com.microsoft.QuickGelu(x) }", "",
        "QuickGelu is an operator of com.microsoft, which only ONNX Runtime has",
    ),
    "a dtype": (
        "(bfloat16[n] x) => (bfloat16[n] y) { y = Neg(x) }", "", "'x' is bfloat16, which not every",
    ),
    "a newer opset": (
        "(float[n] x) => (float[n] y) { y = Neg(x) }",
        f'<ir_version: 10, opset_import: ["" : {NEWEST_OPSET + 1}]>', "it has opset 27; the newest",
    ),
    "a newer IR": (
        "(float[n] x) => (float[n] y) { y = Neg(x) }",
        f'<ir_version: {NEWEST_IR + 1}, opset_import: ["" : 20]>', "it has IR version 14; the",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPORTABLE)
def test_a_graph_that_not_every_runtime_takes(name: str) -> None:
    body, header, message = UNPORTABLE[name]
    with pytest.raises(LoraFxError, match=message):
        require_portable(graph_of(body, header))


def test_imports_that_nothing_uses_are_dropped() -> None:
    model = graph_of("(float[n] x) => (float[n] y) { y = Neg(x) }")
    require_portable(model)
    assert set(model.opset_imports) == {""}


@pytest.mark.parametrize("options", [{"optimise": True}, {"precision": "int8"}, {}])
def test_a_merged_file_has_operators_of_onnx_alone(options: Any, tmp_path: Path) -> None:
    assert operators(exported(tmp_path / "m.onnx", mode="merged", **options)) == {""}


def test_a_batch_file_has_operators_of_onnx_alone(tmp_path: Path) -> None:
    captured = lora_fx.capture(Net().eval(), (IDS,))
    adapters = [adapter(captured, seed, 2, INCLUDE) for seed in (1, 2)]
    path = exported(tmp_path / "m.onnx", mode="batch", adapters=adapters)
    assert operators(path) == {""}
    assert "Unique" not in {node.op_type for node in onnx.load(path).graph.node}


def test_a_training_step_and_its_forward(tmp_path: Path) -> None:
    exported(tmp_path / "step.onnx", mode=lora_fx.TrainStep(rank=2, include=INCLUDE, loss="mse"))
    assert operators(tmp_path / "step.onnx") == {""}
    assert manifest_of(tmp_path / "step.switch.onnx").required


@pytest.mark.parametrize("bad", [-1, ROWS])
def test_an_id_without_a_row(bad: int, switch: Path) -> None:
    """ONNX Runtime's CPU provider raises for one, and takes the other for the last row."""
    session = Session(switch, "cpu")
    ids = IDS.numpy().copy()
    ids[1, 2] = bad
    if bad > 0:
        with pytest.raises(LoraFxError, match="out of data bounds"):
            session.run({"ids": ids})
        return
    (outputs,) = session.run({"ids": ids}).values()
    assert np.isnan(outputs).all()


class Choice(nn.Module):
    """Ids by the name that mode batch gives its own, and an output of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, adapter_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.fc(self.table(adapter_ids))
        return y, y.argmax(-1)


def test_an_output_that_cannot_tell_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = lora_fx.export(Choice().eval(), path, (IDS,), mode="switch", target="portable")
    (line,) = report.warnings
    assert line.startswith("output 'output_1' cannot hold NaN")
    y, _ = Session(path, "cpu").run({"adapter_ids": np.array([[1, -1]])}).values()
    assert np.isnan(y).all()


LOOKUPS = {
    "by an input": ("y = Gather(w, i)", True),
    "through a reshape": (
        "s = Constant<value_ints = [-1, 1]>()  r = Reshape(i, s)  y = Gather(w, r)", True,
    ),
    "by a part of an input": (
        "a = Constant<value_ints = [0]>()  b = Constant<value_ints = [1]>()"
        "  r = Slice(i, a, b)  y = Gather(w, r)", False,
    ),
    "by a number of the graph's": ("r = Add(i, i)  y = Gather(w, r)", False),
    "along another axis": ("y = Gather<axis = 1>(w, i)", False),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKUPS)
def test_the_lookups_that_are_guarded(name: str) -> None:
    nodes, guarded = LOOKUPS[name]
    body = f"(int64[n] i) => (float[m, k] y) <float[3, 2] w = {{1, 2, 3, 4, 5, 6}}> {{ {nodes} }}"
    model = graph_of(body)
    for node in model.graph:
        if node.op_type == "Gather":
            node.name = "node_embedding"  # as torch's exporter calls that of an embedding
    assert GuardLookups()(model).modified is guarded
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (right,) = session.run(None, {"i": np.array([1, 0])})
    assert np.isfinite(right).all()
    (wrong,) = session.run(None, {"i": np.array([1, -1])})
    assert np.isnan(wrong).all() == guarded
    (empty,) = session.run(None, {"i": np.zeros(0, np.int64)})
    assert not np.isnan(empty).any()


def test_ids_beyond_the_table_are_told_where_the_kernel_answers() -> None:
    """The table gets more rows than its guard knows, so that the kernel does not raise."""
    tables = "<float[3, 2] w = {1, 2, 3, 4, 5, 6}>"
    model = graph_of(f"(int64[n] i) => (float[m, k] y) {tables} {{ y = Gather(w, i) }}")
    assert GuardLookups()(model).modified
    table = model.graph.initializers["w"]
    table.const_value = ir.tensor(np.ones((9, 2), np.float32))
    table.shape = ir.Shape((9, 2))
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for bad in (3, 8, -4):
        (wrong,) = session.run(None, {"i": np.array([0, bad])})
        assert np.isnan(wrong).all(), bad


def test_ids_that_count_from_the_end_stay_right() -> None:
    """ONNX takes them; so does a table that a torch model indexes, unlike an embedding."""
    body = (
        "(int64[n] i) => (float[m, k] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { y = Gather(w, i) }"
    )
    model = graph_of(body)
    assert GuardLookups()(model).modified
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (last,) = session.run(None, {"i": np.array([-1, 0])})
    assert np.array_equal(last, [[5, 6], [1, 2]])
    bounds: list[int] = []
    for name, value in model.graph.initializers.items():
        if name.startswith("lora_fx_lookup") and value.const_value is not None:
            bounds += value.const_value.numpy().reshape(-1).tolist()
    assert -3 in bounds and 2 in bounds
