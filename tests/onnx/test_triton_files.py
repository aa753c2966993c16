"""Model repositories of .onnx files of others, and copies that fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.errors import LoraFxError
from lora_fx.onnx.triton import check_repository, write_repository
from lora_fx.onnx.triton_config import Config, Port
from tests.onnx.triton_models import Net, export, folders
from tests.onnx.triton_rules import loads, proto


def test_names_dtypes_and_sizes_of_any_model(tmp_path: Path) -> None:
    """A file of others: quotes in names, every dtype that Triton knows, fixed dimensions."""
    kinds = "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FLOAT16 FLOAT DOUBLE STRING"
    kinds += " BFLOAT16"
    name, tensor = 'x"\\ é\t', onnx.TensorProto
    make, value = onnx.helper, onnx.helper.make_tensor_value_info
    nodes, ins, outs = [], [], []
    for i, kind in enumerate(kinds.split()):
        ins.append(value(f"{name}{i}", getattr(tensor, kind), ["n", 3]))
        outs.append(value(f"y{i}", getattr(tensor, kind), ["n", 3]))
        nodes.append(make.make_node("Identity", [ins[-1].name], [outs[-1].name]))
    free = make.make_tensor("free", tensor.FLOAT, [0], [])  # no adapter's: keeps its value
    ins.append(value("free", tensor.FLOAT, [0]))
    graph = make.make_graph(nodes, "g", ins, outs, [free])
    opset = [make.make_opsetid("", 20)]
    onnx.save(make.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "a.onnx")
    write_repository(tmp_path / "a.onnx", tmp_path / "models", name="any model")
    config = loads(tmp_path / "models" / "any model")
    assert [p.name for p in config.input] == [f"{name}{i}" for i in range(14)]
    assert len({p.data_type for p in config.input}) == 14
    for dims, why in (([0, 3], "no dimension of 0"), (None, "sequence|seq")):
        if dims is None:
            ins[0].type.CopyFrom(make.make_sequence_type_proto(ins[1].type))
            outs[0].type.CopyFrom(ins[0].type)
        else:
            ins[0] = value("x", tensor.BOOL, dims)
            nodes[0].input[0] = "x"
            outs[0] = value("y0", tensor.BOOL, dims)
        bad = make.make_graph(nodes, "g", ins, outs, [free])
        onnx.save(make.make_model(bad, opset_imports=opset, ir_version=10), tmp_path / "b.onnx")
        with pytest.raises(LoraFxError, match=why):
            write_repository(tmp_path / "b.onnx", tmp_path / "models")
    assert folders(tmp_path / "models")[0] == "any model"
    assert not (tmp_path / "models" / "b").exists()


def test_a_copy_that_does_not_load_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "m.onnx", None, external_over=100)
    copy = shutil.copyfile

    def failing(source: Path, target: Path) -> None:
        if Path(target).name != "m.onnx.data":
            copy(source, target)

    monkeypatch.setattr("lora_fx.onnx.place.shutil.copyfile", failing)
    with pytest.raises(LoraFxError, match="cannot load it"):
        write_repository(tmp_path / "m.onnx", tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_half_precision(tmp_path: Path) -> None:
    export(tmp_path / "m.onnx", tmp_path / "models", Net(scalar=False, dtype=torch.float16))
    assert {
        proto().DataType.Name(p.data_type) for p in loads(tmp_path / "models" / "m").output
    } == {"TYPE_FP16"}


@given(st.text(max_size=12))
def test_names_are_read_as_protobuf_reads_them(text: str) -> None:
    from google.protobuf import text_format

    written = Config(text, {text: Port("TYPE_FP32", (-1,))}, {}).to_text()
    config = text_format.Parse(written, proto().ModelConfig())
    assert [config.name, config.input[0].name] == [text, text]
    assert Config.from_text(written, "x").name == text
    assert list(Config.from_text(written, "x").inputs) == [text]


def test_a_damaged_config_is_refused_or_read() -> None:
    """Every prefix, and one with each character replaced: nothing but LoraFxError is raised."""
    port = 'input { name: "a" data_type: TYPE_FP32 dims: [ -1, 3 ] optional: true }'
    text = f'name: "m" # one\nbackend: "onnxruntime"\nmax_batch_size: 0\n{port}\n'
    assert Config.from_text(text, "x").inputs == {"a": Port("TYPE_FP32", (-1, 3), True)}
    damaged = [text[:i] for i in range(len(text))]
    damaged += [text[:i] + c + text[i + 1 :] for i in range(len(text)) for c in '"{}[:\\\xff1']
    refused = 0
    for one in [
        *damaged,
        "a {" * 5000,
        'name: "\\377"',
        "input: 3",
        "name: 'm' name: 'm'",
        port * 2,
    ]:
        try:
            Config.from_text(one, "x")
        except LoraFxError as error:
            refused += 1
            assert error.message.startswith("x: ")
    assert refused > 300


def test_a_repository_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="no such folder"):
        check_repository(tmp_path / "none")
    (tmp_path / "file").touch()
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(LoraFxError, match="it holds no model"):
        check_repository(tmp_path)


def test_data_under_the_name_of_the_copy(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    value = onnx.helper.make_tensor_value_info
    x, y = (value(name, onnx.TensorProto.FLOAT, [500]) for name in "xy")
    w = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [500], bytes(2000), raw=True)
    graph = onnx.helper.make_graph([node], "g", [x], [y], [w])
    opsets = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="model.onnx")
    with pytest.raises(LoraFxError, match=r"its data file cannot be called 'model\.onnx'"):
        write_repository(tmp_path / "m.onnx", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_dtype_that_triton_does_not_number() -> None:
    text = 'name: "m" input { name: "x" data_type: 99 dims: [ 1 ] }'
    text = f'backend: "onnxruntime" {text}'
    with pytest.raises(LoraFxError, match="the data_type 99 is unknown"):
        Config.from_text(text, "x")
