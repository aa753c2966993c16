"""Whole tensors of adapters in modes switch, load and batch, in portable files and in programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full
from lora_fx.compare import rel
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError, NoEffectError
from lora_fx.formats.io import load_adapter
from lora_fx.onnx import Session, whole_rows
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.manifest import Manifest, manifest_of
from lora_fx.onnx.runtime_adapter import read_file, write_file
from lora_fx.onnx.session import open_session
from tests.passes.whole_nets import (
    KINDS,
    LORA,
    ByHand,
    Net,
    Tied,
    Turned,
    adapters_of,
    captured,
    ids,
    lora,
    numbers,
)

TOL = 1e-6
MODES: dict[str, dict[str, Any]] = {
    "switch": {"mode": "switch"},
    "load": {"mode": "load"},
    "batch": {"mode": "batch"},
    "portable": {"mode": "switch", "target": "portable"},
    "program": {"mode": "switch"},
}
REFUSED = {("kernel of a convolution", "batch")}
Run = Callable[[str | None, Array], dict[str, Array]]


def _with_base(adapters: dict[str, Adapter]) -> dict[str | None, Adapter | None]:
    choices: dict[str | None, Adapter | None] = {None: None}
    choices.update(adapters)
    return choices


def exported(
    mode: str, adapters: dict[str, Adapter], folder: Path, kind: type[torch.nn.Module] = Net
) -> Path:
    path = folder / ("m.pt2" if mode == "program" else "m.onnx")
    provider = {} if mode == "program" else {"provider": "cpu"}
    options = {**MODES[mode], **provider, "probe": "none"}
    lora_fx.export(captured(kind), path, adapters=adapters, **options)
    return path


def runner(mode: str, path: Path, names: list[str], input_name: str = "ids") -> Run:
    """What runs a written file with an adapter that the export wrote beside it."""
    if mode == "batch":
        of_batch = open_session(path, "cpu")

        def run_rows(name: str | None, x: Array) -> dict[str, Array]:
            number = 0 if name is None else names.index(name) + 1
            return of_batch.run({input_name: x, IDS: np.full(len(x), number, np.int64)})

        return run_rows
    if mode == "load":
        return lambda name, x: Session(
            path, "cpu", adapter=name and path.with_name(f"{name}.onnx_adapter")
        ).run({input_name: x})
    if mode == "program":
        return _run_of_program(path)
    session = Session(path, "cpu")
    ending = "safetensors" if mode == "portable" else "onnx_adapter"
    for name in names:
        session.load(name, path.with_name(f"{name}.{ending}"))
    return lambda name, x: session.run({input_name: x}, adapter=name)


def _run_of_program(path: Path) -> Run:
    from safetensors.torch import load_file

    program = torch.export.load(path).module()

    def run(name: str | None, x: Array) -> dict[str, Array]:
        file = path.with_name(f"{name or 'm.base'}.safetensors")
        with torch.no_grad():
            outputs = program(torch.tensor(x), **load_file(file))
        return {key: value.numpy() for key, value in outputs.items()}

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_mode(kind: str, mode: str, tmp_path: Path) -> None:
    adapters = adapters_of(kind)
    if (kind, mode) in REFUSED:
        with pytest.raises(
            LoraFxError, match=r"'conv\.weight' is a whole tensor.*row in Conv"
        ) as e:
            exported(mode, adapters, tmp_path)
        assert "lora-fx convert ADAPTER -o OUT --exclude conv.weight" in e.value.hint
        assert not [*tmp_path.iterdir()]
        return
    path = exported(mode, adapters, tmp_path)
    run = runner(mode, path, [*adapters])
    by_hand = ByHand()
    base = run(None, ids())
    for name, adapter in _with_base(adapters).items():
        ours = run(name, ids())
        expected = by_hand.run(adapter, ids())
        for output, value in expected.items():
            assert rel(ours[output], value) < TOL, (name, output)
        if name in ("beside", "alone"):
            assert rel(ours["y"], base["y"]) > 0.05, name
    if kind.startswith("head"):
        np.testing.assert_array_equal(run("alone", ids())["twin"], base["twin"])
    np.testing.assert_array_equal(run(None, ids())["y"], base["y"])
    if mode == "batch":
        _check_mixed_rows(path, adapters)


def _check_mixed_rows(path: Path, adapters: dict[str, Adapter]) -> None:
    """Each row of a batch has the tensors of its own adapter."""
    session = open_session(path, "cpu")
    choices = [None, *adapters.values()]
    rows = [2, 1, 0, 3, 1, 3, 0]
    x = ids(len(rows), 1)
    ours = session.run({"ids": x, IDS: np.array(rows)})
    expected = ByHand().rows([choices[number] for number in rows], x)
    for output, value in expected.items():
        assert rel(ours[output], value) < TOL


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_were_flattened_or_moved(mode: str, tmp_path: Path) -> None:
    of_net = {name: numbers(i, *tensor.shape) for i, (name, tensor) in enumerate(
        Turned().named_parameters()
    )}  # fmt: skip
    adapters = {
        "all": Adapter({name: Full(value) for name, value in of_net.items()}),
        "low": Adapter({"mid.weight": lora(0, 2, "mid.weight", Turned)}),
        "part": Adapter({"mid.bias": Full(of_net["mid.bias"]), "norm.bias": Full(numbers(9, 8))}),
    }
    path = exported(mode, adapters, tmp_path, Turned)
    run = runner(mode, path, [*adapters], "x")
    x = numbers(20, 5, 4, 8)
    for name, adapter in _with_base(adapters).items():
        assert rel(run(name, x)["y"], ByHand(Turned).run(adapter, x)["y"]) < TOL, name
    if mode == "batch":
        choices = [None, *adapters.values()]
        session = open_session(path, "cpu")
        ours = session.run({"x": x, IDS: np.array([3, 0, 1, 2, 1])})
        rows = [choices[number] for number in (3, 0, 1, 2, 1)]
        assert rel(ours["y"], ByHand(Turned).rows(rows, x)["y"]) < TOL
        empty = session.run({"x": x[:0], IDS: np.zeros(0, np.int64)})
        assert empty["y"].shape == (0, 5)


@pytest.mark.parametrize("mode", MODES)
def test_a_tied_tensor_is_replaced_in_all_its_uses(mode: str, tmp_path: Path) -> None:
    value = Full(numbers(0, 40, 12), tied=True)
    adapters = {
        "tied": Adapter({"table.weight": value}),
        "low": Adapter({"fc.weight": lora(0, 2, "fc.weight", Tied)}),
    }
    path = exported(mode, adapters, tmp_path, Tied)
    run = runner(mode, path, [*adapters])
    for name, adapter in _with_base(adapters).items():
        assert rel(run(name, ids())["y"], ByHand(Tied).run(adapter, ids())["y"]) < TOL, name
    if mode == "batch":  # no number of another adapter's table is read
        for outside in (40, -41):
            with pytest.raises(LoraFxError, match="indices element out of data bounds"):
                run("tied", np.array([[outside, 0], [0, 1]]))
        from_end = run("tied", np.array([[-1, 0]]))["y"]
        np.testing.assert_array_equal(from_end, run("tied", np.array([[39, 0]]))["y"])


@pytest.mark.parametrize("mode", ["switch", "batch"])
def test_the_head_alone_of_a_tied_tensor(mode: str, tmp_path: Path) -> None:
    """PEFT saves one name, and means that name: the lookup stays the base's."""
    head = numbers(0, 40, 12)
    adapters = {
        "head": Adapter({"head.weight": Full(head)}),
        "low": Adapter({"fc.weight": lora(0, 2, "fc.weight", Tied)}),
    }
    path = exported(mode, adapters, tmp_path, Tied)
    run = runner(mode, path, [*adapters])
    net = Tied().double()
    net.head.weight = torch.nn.Parameter(torch.tensor(head).double())
    with torch.no_grad():
        expected = net(torch.tensor(ids()))["y"].numpy()
    assert rel(run("head", ids())["y"], expected) < TOL
    assert rel(run("low", ids())["y"], ByHand(Tied).run(adapters["low"], ids())["y"]) < TOL


def test_the_graph_of_a_batch(tmp_path: Path) -> None:
    """Each row's head in the place of the base's product, and its bias; the twin is as it was."""
    path = exported("batch", {"own": Adapter(dict(KINDS["head"]))}, tmp_path)
    model = ir.load(path)
    producers = {value: node for node in model.graph for value in node.outputs}

    def text(value: ir.Value | None) -> str:
        assert value is not None
        node = producers.get(value)
        if node is None:
            return str(value.name)
        if node.op_type in ("Tanh", "LayerNormalization"):
            return "x"
        if str(node.name).startswith("lora_fx: adapter_ids") or node.op_type == "Where":
            return (
                "ids"
                if value.dtype is ir.DataType.INT64 or node.inputs[1].name == "adapter_ids_zero"
                else text(node.inputs[2])
            )
        return f"{node.op_type}({', '.join(text(operand) for operand in node.inputs)})"

    y, twin = (text(value) for value in model.graph.outputs)
    reshape = y.partition("Reshape(Gather(head.bias.batch, ids), ")[2].rstrip(")")
    assert y == (
        "Add(MatMul(x, Gather(head.weight.batch, ids)), "
        f"Reshape(Gather(head.bias.batch, ids), {reshape}))"
    )
    assert twin == "Add(MatMul(x, twin.weight), twin.bias)"
    shape = model.graph.initializers[reshape].const_value
    assert shape is not None and shape.numpy().tolist() == [0, 1, 5]
    assert "head.weight" not in model.graph.initializers, "the table has the base's value"
    table = model.graph.initializers["head.weight.batch"].const_value
    assert table is not None and tuple(table.shape.numpy()) == (2, 16, 5)
    np.testing.assert_array_equal(table.numpy()[0], Net().head.weight.detach().numpy().T)
    np.testing.assert_array_equal(table.numpy()[1], KINDS["head"]["head.weight"].value.T)


def test_adapters_without_the_tensor_share_the_entry_of_the_base(tmp_path: Path) -> None:
    path = exported("batch", adapters_of("head"), tmp_path)
    table = ir.load(path).graph.initializers["head.weight.batch"].const_value
    assert table is not None and table.shape.numpy()[0] == 2, "of four ids"


def test_the_manifest_has_the_slot_and_a_file_reads_back(tmp_path: Path) -> None:
    adapters = adapters_of("head")
    path = exported("switch", adapters, tmp_path)
    manifest = manifest_of(path)
    slot = manifest.whole["head.weight"]
    assert (slot.name, slot.shape, slot.dtype) == ("head.weight", (5, 16), "float32")
    assert {*manifest.slots} == {LORA}
    assert Manifest.from_text(manifest.to_text(), "m") == manifest
    read = load_adapter(path.with_name("beside.onnx_adapter"))
    for key in KINDS["head"]:
        np.testing.assert_array_equal(read.full[key].value, adapters["beside"].full[key].value)
    report = lora_fx.verify(path, path.with_name("beside.onnx_adapter"))
    assert report.details == {"targets": 1, "adapted": 1, "whole_tensors": 2, "replaced": 2}
    session = Session(path, "cpu")
    session.load("again", adapters["beside"])
    session.load("file", path.with_name("beside.onnx_adapter"))
    outputs = [session.run({"ids": ids()}, name)["y"] for name in ("again", "file")]
    np.testing.assert_array_equal(*outputs)


def test_a_file_without_whole_tensors_is_what_it_was(tmp_path: Path) -> None:
    """Older versions read it: the manifest has format 1, and no slot of another kind."""
    path = exported("switch", {"low": Adapter({LORA: lora(0, 2)})}, tmp_path)
    text = manifest_of(path).to_text()
    assert '"format": 1' in text and "whole" not in text
    with_head = manifest_of(exported("load", adapters_of("head"), tmp_path / ".."))
    assert '"format": 2' in with_head.to_text()


def test_plain_onnx_runtime_takes_the_head(tmp_path: Path) -> None:
    import onnxruntime as ort

    adapters = adapters_of("head")
    path = exported("switch", adapters, tmp_path)
    session = open_session(path, "cpu").session
    loaded = ort.LoraAdapter()
    loaded.Load(str(path.with_name("beside.onnx_adapter")))
    options = ort.RunOptions()
    options.add_active_adapter(loaded)
    (y,) = session.run(["y"], {"ids": ids()}, options)
    assert rel(y, ByHand().run(adapters["beside"], ids())["y"]) < TOL


def test_a_mix_cannot_hold_a_head(tmp_path: Path) -> None:
    path = exported("switch", adapters_of("head"), tmp_path)
    session = Session(path, "cpu")
    for name in ("beside", "lacking"):
        session.load(name, path.with_name(f"{name}.onnx_adapter"))
    mixed = session.run({"ids": ids()}, {"beside": 1.0})["y"]
    np.testing.assert_array_equal(mixed, session.run({"ids": ids()}, "beside")["y"])
    with pytest.raises(LoraFxError, match=r"a mix cannot hold the whole tensor 'head\.weight' of"):
        session.run({"ids": ids()}, {"beside": 0.5, "lacking": 0.5})
    with pytest.raises(LoraFxError, match="a mix cannot hold the whole tensor"):
        session.run({"ids": ids()}, {"beside": 0.5})
    session.run({"ids": ids()}, {"lacking": 0.5})
    with pytest.raises(LoraFxError, match="has buffers for A and B only"):
        Session(path, "cpu", cuda_graph=True)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "shape": (
        {"head.weight": numbers(0, 7, 16)},
        r"the whole tensor 'head\.weight' is \[7, 16\]; expected \[5, 16\]",
    ),
    "lies the other way": (
        {"head.weight": numbers(0, 16, 5)},
        r"the whole tensor 'head\.weight' is \[16, 5\]; expected \[5, 16\]",
    ),
    "dtype": ({"head.bias": np.zeros(5, "f2")}, r"'head\.bias' is float16; expected float32"),
    "unknown": ({"twin.bias": np.zeros(5, "f4")}, r"tensor 'twin\.bias' is not an input"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("mode", ["switch", "load"])
def test_a_damaged_adapter_is_refused(wrong: str, mode: str, tmp_path: Path) -> None:
    path = exported(mode, adapters_of("head"), tmp_path)
    tensors, versions = read_file(path.with_name("beside.onnx_adapter"))
    change, words = WRONG[wrong]
    write_file(tmp_path / "bad.onnx_adapter", {**tensors, **change}, versions)
    with pytest.raises(LoraFxError, match=words):
        lora_fx.verify(path, tmp_path / "bad.onnx_adapter")
    with pytest.raises(LoraFxError, match=words):
        if mode == "load":
            Session(path, "cpu", adapter=tmp_path / "bad.onnx_adapter")
        else:
            Session(path, "cpu").load("bad", tmp_path / "bad.onnx_adapter")


@pytest.mark.parametrize("mode", MODES)
def test_heads_of_other_label_counts_are_refused(mode: str, tmp_path: Path) -> None:
    adapters = {
        "five": Adapter({"head.weight": Full(numbers(0, 5, 16))}),
        "seven": Adapter({"head.weight": Full(numbers(0, 7, 16))}),
    }
    words = r"adapter tensor 'head\.weight' is \[7, 16\]; the model's is \[5, 16\]"
    with pytest.raises(MisfitError, match=words) as caught:
        exported(mode, adapters, tmp_path)
    assert "as many labels as the adapter" in caught.value.hint
    assert not [*tmp_path.iterdir()]


def test_weights_by_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="which is replaced and has no weight by row") as caught:
        lora_fx.export(
            captured(), tmp_path / "m.onnx", adapters=adapters_of("head"),
            mode=lora_fx.Batch(scales=True),
        )  # fmt: skip
    assert caught.value.hint == "leave --scales out"


class Unread(Net):
    """Nothing reads its last layer."""

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": super().forward(ids)["y"]}


@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_that_no_output_depends_on(mode: str, tmp_path: Path) -> None:
    adapters = {"one": Adapter({"twin.bias": Full(numbers(0, 5)), LORA: lora(0, 2)})}
    with pytest.raises(LoraFxError, match=r"'twin\.bias': an adapter replaces this tensor") as e:
        exported(mode, adapters, tmp_path, Unread)
    assert "--exclude twin.bias" in e.value.hint


@pytest.mark.parametrize("mode", ["switch", "batch"])
def test_one_use_beside_the_whole_is_refused(mode: str, tmp_path: Path) -> None:
    one_use = lora(0, 2, "table.weight", Tied)
    adapters = {
        "whole": Adapter({"table.weight": Full(numbers(0, 40, 12), tied=True)}),
        "use": Adapter({"table.weight@head.weight": one_use}),
    }
    with pytest.raises(LoraFxError, match="changes one use of a tensor that another adapter"):
        exported(mode, adapters, tmp_path, Tied)


def _probed(tmp_path: Path, mode: str) -> Path:
    path = tmp_path / "m.onnx"
    adapters = {
        "own": Adapter({LORA: lora(0, 2), **KINDS["head"]}),
        "other": Adapter({LORA: lora(0, 2), "head.weight": Full(numbers(30, 5, 16))}),
    }
    lora_fx.export(captured(), path, adapters=adapters, mode=mode, provider="cpu")
    assert lora_fx.verify(path)
    return path


@pytest.mark.parametrize("mode", ["switch", "load"])
def test_verify_notices_a_head_that_is_lost_or_another_s(mode: str, tmp_path: Path) -> None:
    path = _probed(tmp_path, mode)
    file = path.with_name("own.onnx_adapter")
    tensors, versions = read_file(file)
    without = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    file.unlink()
    write_file(file, without, versions)
    report = lora_fx.verify(path)
    assert not report
    assert "whole tensors" in str(report.details)
    with pytest.raises(NoEffectError, match="whole tensors"):
        if mode == "load":
            Session(path, "cpu", adapter=file, check=True)
        else:
            Session(path, "cpu", check=True).load("own", file)
    file.unlink()
    file.write_bytes(path.with_name("other.onnx_adapter").read_bytes())
    assert not lora_fx.verify(path)


def test_the_proof_sees_tables_in_another_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = whole_rows._Table.of

    def exchanged(values: Any) -> Any:
        base, beside, lacking, alone = values
        return made([base, lacking, beside, alone])

    monkeypatch.setattr(whole_rows._Table, "of", exchanged)
    with pytest.raises(NoEffectError):
        exported("batch", adapters_of("head"), tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("mode", ["switch", "load", "batch"])
def test_the_proof_sees_a_bias_that_is_dropped(
    mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_switch = Manifest.tensors
    of_batch = whole_rows.choose_by_row

    def tensors(self: Manifest, *args: Any) -> Any:
        return {k: v for k, v in of_switch(self, *args).items() if k != "head.bias"}

    def choose(graph: Any, whole: Any, *others: Any) -> None:
        of_batch(graph, [one for one in whole if one.name != "head.bias"], *others)

    monkeypatch.setattr(Manifest, "tensors", tensors)
    monkeypatch.setattr("lora_fx.passes.batch.choose_by_row", choose)
    with pytest.raises(NoEffectError):
        exported(mode, adapters_of("head"), tmp_path)


def test_a_large_head_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("export_files", "export_batch"):
        monkeypatch.setattr(f"lora_fx.passes.verbs.{module}.LARGE_TENSORS", 100)
    report = lora_fx.export(
        captured(), tmp_path / "m.onnx", adapters=adapters_of("head"), mode="switch", probe="none"
    )
    assert any("beside: its whole tensors (head.bias, head.weight)" in w for w in report.warnings)
    report = lora_fx.export(
        captured(), tmp_path / "b.onnx", adapters=adapters_of("head"), mode="batch", probe="none"
    )
    assert any("head.weight: the file has it 3 times" in w for w in report.warnings)


@pytest.mark.parametrize("mode", MODES)
def test_a_head_beside_dora(mode: str, tmp_path: Path) -> None:
    """The factors of rows are of the base's weight, whatever head lies beside it."""
    low = lora(0, 2)
    dora = replace(low, variant="dora", magnitude=np.linspace(0.5, 2, 16).astype("f4"))
    adapters = {
        "dora": Adapter({LORA: dora, **KINDS["head"]}),
        "whole": Adapter(dict(KINDS["adapted by another"])),
    }
    run = runner(mode, exported(mode, adapters, tmp_path), [*adapters])
    branched = lora_fx.insert(captured(), adapter=adapters["dora"]).eval()
    with torch.no_grad():
        expected = branched(torch.tensor(ids()))["y"].numpy()
    assert rel(run("dora", ids())["y"], expected) < TOL
    assert rel(run("whole", ids())["y"], ByHand().run(adapters["whole"], ids())["y"]) < TOL
