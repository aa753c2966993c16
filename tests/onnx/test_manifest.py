"""Manifests that are damaged, of another file or mode, and other metadata that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError, stamp
from lora_fx.onnx.adapter_ids import RowChoice
from lora_fx.onnx.inserted_branches import adapter_in
from lora_fx.onnx.manifest import PROPERTY, Manifest, SwitchSlot
from lora_fx.onnx.range_guards import RANGES, conditions_of, guard_within
from lora_fx.onnx.runtime_adapter import write_file

MANIFEST = Manifest({"w": SwitchSlot("w.lora_A", "w.lora_B", 4, 3)})
FITTING: dict[str, tuple[str, tuple[object, ...]]] = {
    "w.lora_A": ("float32", (4, "rank")),
    "w.lora_B": ("float32", ("rank", 3)),
}


def model_of(text: str) -> ir.Model:
    header = '<ir_version: 10, opset_import: ["" : 20]>'
    return ir.from_proto(onnx.parser.parse_model(f"{header} m {text}"))


@pytest.mark.parametrize(
    "data",
    [{"mode": "switch"}, {"slots": {}}, {"mode": "load", "slots": []}]
    + [{"mode": "switch", "slots": {"w": fields}} for fields in ({}, {"batch": 1}, "w")],
)
def test_a_damaged_manifest(data: dict[str, Any]) -> None:
    with pytest.raises(LoraFxError, match="f: its manifest is damaged"):
        Manifest.from_text(json.dumps({**stamp(), **data}), "f")


def test_no_tensors() -> None:
    with pytest.raises(LoraFxError, match="it holds no tensors"):
        MANIFEST.check({}, "f")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({}, ""),
        ({"w.lora_A": ("float16", (4, "rank"))}, "'w.lora_A' is float16, but float32 in its"),
        ({"w.lora_A": ("float32", (5, "rank"))}, r"'w.lora_A' is \[5, 'rank'\], but \[4, rank\]"),
        ({"w.lora_A": ("float32", (4,))}, r"'w.lora_A' is \[4\], but \[4, rank\]"),
        ({"w.lora_B": ("float32", (2, "out"))}, ""),  # free sizes fit, and so does any rank
        ({"w.lora_B": ("float32", ("rank", 2))}, r"'w.lora_B' is \['rank', 2\], but \[rank, 3\]"),
    ],
)
def test_a_graph_beside_its_manifest(declared: Any, message: str) -> None:
    if not message:
        MANIFEST.check_declared({**FITTING, **declared}, "f")
        return
    with pytest.raises(LoraFxError, match=message):
        MANIFEST.check_declared({**FITTING, **declared}, "f")


def test_an_input_of_ids_in_another_mode() -> None:
    shapes = {"x": ["n", 3], "adapter_ids": ["n"]}
    for mode, adapters in (("switch", ["a"]), ("batch", None)):
        text = json.dumps({**stamp(), "mode": mode, "adapters": adapters})
        assert RowChoice.from_text(text, shapes) is None
    text = json.dumps({**stamp(), "mode": "batch", "adapters": ["a"]})
    assert RowChoice.from_text(text, shapes) == RowChoice(("a",), ("x",))


def test_a_runtime_that_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is not full: the runtime's own words are passed on."""

    def unreadable(path: Path) -> None:
        raise RuntimeError("no words")

    monkeypatch.setattr("lora_fx.onnx.runtime_adapter.read_file", unreadable)
    versions = {"adapter_version": 1, "model_version": 1}
    with pytest.raises(LoraFxError, match=r"a\.onnx_adapter: ONNX Runtime cannot write it: no wo"):
        write_file(tmp_path / "a.onnx_adapter", {"a": np.zeros((2, 3), np.float32)}, versions)


def test_a_branch_whose_tensor_was_renamed(tmp_path: Path) -> None:
    model = model_of("(float[n] x) => (float[n] y) { y = Relu(x) }")
    row = {"variant": "lora", "a": "w.lora_A", "b": "w.lora_B"}
    listing = {**stamp(), "mode": "insert", "targets": {"w": row}, "metadata": {}}
    model.metadata_props[PROPERTY] = json.dumps(listing)
    ir.save(model, tmp_path / "m.onnx")
    with pytest.raises(LoraFxError, match=r"tensor 'w\.lora_A' is missing"):
        adapter_in(tmp_path / "m.onnx")


@pytest.mark.parametrize("text", ['{"a": 1}', '[{"text": "a <= 7"}]', "3"])
def test_damaged_ranges(text: str) -> None:
    with pytest.raises(LoraFxError, match=r"its metadata lora_fx\.ranges is damaged"):
        conditions_of({RANGES: text}, "f")


def test_guards_stand_once_and_before_an_input_that_is_an_output() -> None:
    model = model_of("(float[n] x) => (float[n] x, float[n] y) { y = Relu(x) }")
    conditions = [Condition("n <= 7", (("n", "x", 0),))]
    guard_within(model, conditions)
    count = len(model.graph)
    guard_within(model, conditions)
    assert len(model.graph) == count
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    assert session.run(None, {"x": np.ones(7, np.float32)})[0].shape == (7,)
    with pytest.raises(Exception, match=r"x\[0\] <= 7"):
        session.run(None, {"x": np.ones(8, np.float32)})
