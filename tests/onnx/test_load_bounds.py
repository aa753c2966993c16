"""Files that are refused as they are opened: nodes of functions, names, sums and texts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from lora_fx.errors import LoraFxError
from lora_fx.onnx.load import load

DATA = bytes(16)


def model(
    tensors: list[TensorProto], functions: list[onnx.FunctionProto] | None = None
) -> onnx.ModelProto:
    """A graph of one call of f0, or of an op of ONNX where there are no functions."""
    node = helper.make_node("f0", ["x"], ["y"], domain="own")
    if not functions:
        node = helper.make_node("Identity", ["x"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    graph = helper.make_graph([node], "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=opsets, functions=functions or [])


def doubling(count: int, *, last: str = "") -> list[onnx.FunctionProto]:
    """Functions that call the next one twice; the last one calls `last`, or an op of ONNX."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    functions = []
    for number in range(count):
        name, domain = f"f{number + 1}", "own"
        if number + 1 == count:
            name, domain = (last, "own") if last else ("Identity", "")
        first = helper.make_node(name, ["x"], ["t"], domain=domain)
        second = helper.make_node(name, ["t"], ["y"], domain=domain)
        functions.append(
            helper.make_function("own", f"f{number}", ["x"], ["y"], [first, second], opsets)
        )
    return functions


def external(checksum: str, folder: Path) -> TensorProto:
    """Four floats in w.data, with a sum."""
    (folder / "w.data").write_bytes(DATA)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=1)
    for key, value in {"location": "w.data", "length": "16", "checksum": checksum}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def floats(name: str) -> TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, [4], [0.0] * 4)


def texts(*sizes: int) -> TensorProto:
    return TensorProto(name="t", data_type=TensorProto.STRING, dims=sizes, string_data=[b"a", b"b"])


def saved(folder: Path, proto: onnx.ModelProto) -> Path:
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


@pytest.mark.parametrize(
    ("functions", "text"),
    [
        (doubling(16), "65536 nodes when functions are inlined; at most 20660 are read"),
        (doubling(3, last="f1"), "the function 'f1' calls itself"),
        (doubling(700), "its functions call each other too deeply"),
    ],
)
def test_functions_that_are_too_many_nodes(
    functions: list[onnx.FunctionProto], text: str, tmp_path: Path
) -> None:
    with pytest.raises(LoraFxError, match=text):
        load(saved(tmp_path, model([], functions)))


def test_a_few_functions_are_read(tmp_path: Path) -> None:
    assert len(load(saved(tmp_path, model([], doubling(3)))).functions) == 3


def test_two_initialisers_of_one_name(tmp_path: Path) -> None:
    path = saved(tmp_path, model([floats("v"), floats("w"), floats("w")]))
    with pytest.raises(LoraFxError, match="two initialisers are called 'w'"):
        load(path)


def test_the_sum_of_a_data_file(tmp_path: Path) -> None:
    sha1 = hashlib.sha1(DATA).hexdigest()
    path = saved(tmp_path, model([external(sha1.upper(), tmp_path)]))
    assert list(load(path).graph.initializers) == ["w"]
    path = saved(tmp_path, model([external("0" * 40, tmp_path)]))
    with pytest.raises(LoraFxError, match=f"w.data has the SHA-1 sum {sha1}; expected 0000"):
        load(path)


def test_texts_fit_their_sizes(tmp_path: Path) -> None:
    assert list(load(saved(tmp_path, model([texts(1, 2)]))).graph.initializers) == ["t"]
    with pytest.raises(LoraFxError, match=r"its number of strings does not fit its sizes \[3\]"):
        load(saved(tmp_path, model([texts(3)])))
