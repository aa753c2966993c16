"""Files of ONNX Runtime: written and read by it, and run by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.dtypes import numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import format_of, is_adapter, load_adapter, save_adapter
from lora_fx.onnx.runtime_adapter import read_file, write_file

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
A, B = (
    RNG.standard_normal((2, 6)).astype(np.float32),
    RNG.standard_normal((8, 2)).astype(np.float32),
)


def test_scales_are_multiplied_in(tmp_path: Path) -> None:
    file = tmp_path / "x.onnx_adapter"
    stack = LowRank(np.ones((3, 2, 6), np.float32), np.ones((3, 8, 2), np.float32), 2.0)
    entries: dict[str, Any] = {
        "h.x.weight": LowRank(A, B, 3.0),
        "rs": LowRank(A, B, 3.0, variant="rslora"),
        "experts[1]": stack,
        "head.bias": Full(np.arange(3, dtype=np.float32)),
        "ids": Full(np.arange(3)),
    }
    adapter = Adapter(entries, {"model_version": 7})
    (note,) = save_adapter(adapter, file, "onnx_adapter")
    assert "scales of 2 updates" in note
    assert format_of(file) == "onnx_adapter" and is_adapter(file)
    params = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
    np.testing.assert_array_equal(params["h.x.weight.lora_B"].numpy(), B * np.float32(1.5))
    np.testing.assert_array_equal(params["h.x.weight.lora_A"].numpy(), A)
    got = load_adapter(file)
    assert got.metadata["model_version"] == 7 and got.metadata["adapter_version"] == 1
    assert sorted(got) == sorted(entries)
    for key in ("h.x.weight", "rs"):
        low = got.lowrank[key]
        assert low.scale == 1.0
        want = entries[key].matrix()
        np.testing.assert_allclose(low.matrix(), want, rtol=1e-6)
    np.testing.assert_array_equal(got.lowrank["experts[1]"].a, stack.a, strict=True)
    for key in ("head.bias", "ids"):
        np.testing.assert_array_equal(got.full[key].value, entries[key].value, strict=True)


def test_reading_gives_back_what_was_read(tmp_path: Path) -> None:
    one, two = tmp_path / "1.onnx_adapter", tmp_path / "2.onnx_adapter"
    save_adapter(Adapter({"x": LowRank(A, B, 3.0)}), one, "onnx_adapter")
    assert save_adapter(load_adapter(one), two, "onnx_adapter") == ()
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes(tmp_path: Path, dtype: str) -> None:
    file, kind = tmp_path / "x.onnx_adapter", numpy_dtype(dtype)
    narrow = {"x.lora_A": A.astype(kind), "x.lora_B": B.astype(kind)}
    write_file(file, narrow, {"adapter_version": 1, "model_version": 1})
    raw, _ = read_file(file)
    np.testing.assert_array_equal(raw["x.lora_A"], narrow["x.lora_A"], strict=True)
    low = load_adapter(file).lowrank["x"]
    np.testing.assert_array_equal(low.b, narrow["x.lora_B"].astype(np.float32), strict=True)


def test_a_whole_tensor_in_fp64_stays_so(tmp_path: Path) -> None:
    file = tmp_path / "x.onnx_adapter"
    write_file(file, {"w": np.array([0.1, 0.2])}, {"adapter_version": 1, "model_version": 1})
    adapter = load_adapter(file)
    np.testing.assert_array_equal(adapter.full["w"].value, np.array([0.1, 0.2]), strict=True)
    assert adapter.metadata["notes"] == []


def test_the_runtime_runs_it(tmp_path: Path) -> None:
    """A graph that takes K.lora_A and K.lora_B as optional inputs; base without the adapter."""
    w = RNG.standard_normal((8, 6)).astype(np.float32)
    file, model = tmp_path / "x.onnx_adapter", tmp_path / "m.onnx"
    save_adapter(Adapter({"w": LowRank(A, B, 3.0)}), file, "onnx_adapter")
    none = [np.zeros((0, 6), np.float32), np.zeros((8, 0), np.float32)]
    names = ["w.lora_A", "w.lora_B"]
    nodes = [
        helper.make_node("MatMul", ["w.lora_B", "w.lora_A"], ["delta"]),
        helper.make_node("Add", ["w", "delta"], ["sum"]),
        helper.make_node("Gemm", ["x", "sum"], ["y"], transB=1),
    ]
    given = [("x", ["n", 6]), (names[0], ["r", 6]), (names[1], [8, "r"])]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in given]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])]
    fixed = [numpy_helper.from_array(v, n) for n, v in zip([*names, "w"], [*none, w], strict=True)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, fixed)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    adapter, run = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(file))
    run.add_active_adapter(adapter)
    x = RNG.standard_normal((5, 6)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ w.T, rtol=1e-4, atol=1e-5)
    want = x @ (w + 1.5 * B @ A).T
    np.testing.assert_allclose(session.run(None, {"x": x}, run)[0], want, rtol=1e-4, atol=1e-5)


LOW = LowRank(A, B, 2.0)


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"x": LowRank(A, B, 1e39)}, r"times 5e\+38 are out of fp32's range"),
        ({"x": LowRank(A, B * np.float32("inf"), 2.0)}, "its B has NaN or infinite values"),
        ({"x": LOW, "x.lora_A": Full(A)}, "two tensors would have the name"),
        ({}, "no update"),
    ],
)
def test_what_the_format_cannot_say(tmp_path: Path, entries: Any, word: str) -> None:
    with pytest.raises(LoraFxError, match=word):
        save_adapter(Adapter(entries), tmp_path / "x.onnx_adapter", "onnx_adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"x.lora_A": A}, r"has no 'x\.lora_B'"),
        ({"x.lora_B": B}, r"has no 'x\.lora_A'"),
        ({"x.lora_A": A.T, "x.lora_B": B}, "pass the adapter that the file was made from"),
        ({"x.lora_A": A * np.float32("nan"), "x.lora_B": B}, "NaN"),
        ({"h": np.full(3, np.inf, np.float32)}, "infinite"),
    ],
)
def test_refused(tmp_path: Path, tensors: dict[str, Array], word: str) -> None:
    file = tmp_path / "x.onnx_adapter"
    write_file(file, tensors, {"adapter_version": 1, "model_version": 1})
    with pytest.raises(LoraFxError, match=word) as caught:
        load_adapter(file)
    assert str(file) in caught.value.message


def test_ranks_of_a_square_weight_that_an_older_export_wrote_are_doubted(tmp_path: Path) -> None:
    """[in, rank] and [rank, out] of a square weight look like in ranks of a small one."""
    file = tmp_path / "x.onnx_adapter"
    write_file(file, {"x.lora_A": A.T, "x.lora_B": A}, {"adapter_version": 1, "model_version": 1})
    (note,) = load_adapter(file).metadata["notes"]
    assert "'x' has more ranks than rows and columns; other tools and older exports" in note


def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match=r"gone\.onnx_adapter: cannot be read: no such file"):
        read_file(tmp_path / "gone.onnx_adapter")


def test_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "x.onnx_adapter"
    save_adapter(Adapter({"x": LOW}), file, "onnx_adapter")
    good = file.read_bytes()
    for n in (60, 200, len(good) // 2):
        file.write_bytes(good[:n])
        with pytest.raises(LoraFxError, match="damaged ONNX Runtime adapter"):
            load_adapter(file)


def test_a_file_that_does_not_read_back_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"x.lora_A": -A, "x.lora_B": B}
    monkeypatch.setattr("lora_fx.onnx.runtime_adapter.read_file", lambda _: (wrong, {}))
    with pytest.raises(LoraFxError, match="differs when it is read back"):
        save_adapter(Adapter({"x": LOW}), tmp_path / "x.onnx_adapter", "onnx_adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", [-1, 2**31, "1", True])
def test_versions(tmp_path: Path, version: object) -> None:
    adapter = Adapter({"x": LOW}, {"model_version": version})
    with pytest.raises(LoraFxError, match="model_version"):
        save_adapter(adapter, tmp_path / "x.onnx_adapter", "onnx_adapter")
