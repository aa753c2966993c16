"""Hostile .onnx files: each is refused in one line that names it, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.errors import LoraFxError
from lora_fx.onnx.load import load
from lora_fx.passes.verbs.merge_onnx import merge_onnx

Change = Callable[[Any, Path], object]


def model(folder: Path) -> onnx.ModelProto:
    """y = x @ w, w [4, 6] in w.data from byte 64 on, with 8 bytes behind it."""
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 6], data_location=1)
    for key, value in {"location": "w.data", "offset": "64", "length": "96"}.items():
        w.external_data.add(key=key, value=value)
    (folder / "w.data").write_bytes(bytes(64) + np.ones(24, "f4").tobytes() + bytes(8))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def entry(key: str, value: str) -> Change:
    def change(w: Any, folder: Path) -> None:
        for e in w.external_data:
            if e.key == key:
                e.value = value
                return
        w.external_data.add(key=key, value=value)

    return change


def _folder(w: Any, folder: Path) -> None:
    (folder / "w.data").unlink()
    (folder / "w.data").mkdir()


def _nothing(w: Any, folder: Path) -> None:
    w.ClearField("external_data")
    w.data_location = 0


HOSTILE: dict[str, tuple[Change, str]] = {
    "roundabout, nothing there": (entry("location", "../nowhere/w.data"), "outside the folder"),
    "a folder": (_folder, "w.data, which is missing"),
    "offset a little too far": (entry("offset", "73"), "bytes 73 to 169"),
    "offset huge": (entry("offset", "9" * 40), "which has only 168"),
    "a key twice": (lambda w, d: w.external_data.add(key="offset", value="0"), "given twice"),
    "nothing stored": (_nothing, "holds 0 numbers; .* need 96"),
    "unknown type": (lambda w, d: setattr(w, "data_type", 77), "dtype 77"),
}


def refused(folder: Path, text: str) -> None:
    before = sorted(p.name for p in folder.iterdir())
    adapter = Adapter({"w": LowRank(np.ones((2, 4), "f4"), np.ones((6, 2), "f4"), 2.0)})
    with pytest.raises(LoraFxError, match=text) as caught:
        merge_onnx(folder / "m.onnx", adapter, folder / "out.onnx")
    assert str(folder / "m.onnx") in str(caught.value) or "w.data" in str(caught.value)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert sorted(p.name for p in folder.iterdir()) == before, "nothing is written"


def test_the_model_itself_is_good(tmp_path: Path) -> None:
    onnx.save(model(tmp_path), tmp_path / "m.onnx")
    value = load(tmp_path / "m.onnx").graph.initializers["w"].const_value
    assert value is not None
    assert (value.numpy() == 1).all()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_external_data(name: str, tmp_path: Path) -> None:
    change, text = HOSTILE[name]
    folder = tmp_path / "in"
    folder.mkdir()
    proto = model(folder)
    change(proto.graph.initializer[0], folder)
    onnx.save(proto, folder / "m.onnx")
    refused(folder, text)


@pytest.mark.parametrize("where", ["body", "function", "attribute", "sparse"])
def test_tensors_anywhere_are_checked(where: str, tmp_path: Path) -> None:
    proto = model(tmp_path)
    bad = TensorProto(name="bad", data_type=TensorProto.FLOAT, dims=[-1])
    constant = helper.make_node("Constant", [], ["c"], value=bad)
    if where == "body":
        body = helper.make_graph([constant], "b", [], [])
        proto.graph.node.append(helper.make_node("If", ["k"], ["z"], then_branch=body))
    elif where == "function":
        opsets = [helper.make_opsetid("", 18)]
        proto.functions.append(helper.make_function("d", "F", [], ["c"], [constant], opsets))
    elif where == "attribute":
        proto.graph.node.append(constant)
    else:
        proto.graph.sparse_initializer.add().values.CopyFrom(bad)
    onnx.save(proto, tmp_path / "m.onnx")
    refused(tmp_path, "'bad' has sizes")
