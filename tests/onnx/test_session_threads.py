"""A session has the threads that the user asks for, and a proof no second copy of the weights."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lora_fx.onnx import session as sessions
from lora_fx.onnx.session import open_session


def product(path: Path) -> Path:
    """x [n, 512] @ W [512, 512]."""
    weight = np.random.default_rng(0).standard_normal((512, 512), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 512])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("variable", "threads", "started"), [("1", 0, 0), ("3,2", 0, 2), ("1", 4, 3), ("no", 2, 1)]
)
def test_threads_are_those_of_the_variable(
    variable: str, threads: int, started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime does not read OMP_NUM_THREADS: it starts one for each core."""
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    path = product(tmp_path / "m.onnx")
    open_session(path, "cpu")  # what the runtime starts once for a process
    before = len(os.listdir("/proc/self/task"))
    session = open_session(path, "cpu", threads)
    assert len(os.listdir("/proc/self/task")) - before == started
    del session


@pytest.mark.parametrize("rows", [1, 2, 10, 100])
def test_packed_weights_give_the_same_numbers(rows: int, tmp_path: Path) -> None:
    path = product(tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((rows, 512), np.float32)
    packed = open_session(path, "cpu").run({"x": x})["y"]
    with sessions.few_runs():
        unpacked = open_session(path, "cpu").run({"x": x})["y"]
    assert np.abs(packed - unpacked).max() <= 1e-6 * np.abs(packed).max()


def test_the_load_of_a_file_is_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes half a minute for a billion parameters."""
    names: list[str] = []

    def stage(name: str) -> contextlib.AbstractContextManager[None]:
        names.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(sessions, "stage", stage)
    open_session(product(tmp_path / "m.onnx"), "cpu")
    assert names == ["loading the file in ONNX Runtime"]
