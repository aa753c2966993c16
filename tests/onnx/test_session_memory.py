"""The memory of sessions: weights inside a file are certain, packed ones are expected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_fx.errors import LoraFxError
from lora_fx.free_memory import FreeMemory
from lora_fx.onnx import session_memory
from lora_fx.onnx.session_memory import check_sessions
from lora_fx.peak_memory import refusing
from lora_fx.progress import telling

WEIGHT = 4 * 300 * 500


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A product whose weight lies in a data file."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 300])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 500])
    weight = numpy_helper.from_array(np.ones((300, 500), np.float32), "weight")
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    model = helper.make_model(helper.make_graph([node], "product", [x], [y], [weight]))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def lines(files: list[Path], free: int, monkeypatch: pytest.MonkeyPatch, packed: bool) -> list[str]:
    monkeypatch.setattr(session_memory, "free_memory", lambda: FreeMemory(free))
    told: list[str] = []
    with telling(told.append), refusing():
        check_sessions("timing", files, "cpu", packed=packed)
    return told


def test_sessions_for_many_runs_copy_the_data(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = file.stat().st_size + WEIGHT
    assert lines([file], whole, monkeypatch, packed=True) == []
    told = lines([file], whole - 1, monkeypatch, packed=True)
    assert "packed weights of data files 600 kB" in told[0]
    assert told[1].startswith("warning: timing may run out of memory: smaller files")


def test_sessions_of_a_proof_read_the_pages_of_the_data(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = file.stat().st_size
    assert lines([file, file], 2 * inside, monkeypatch, packed=False) == []


def test_weights_inside_files_are_certain(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = file.stat().st_size
    with pytest.raises(LoraFxError, match=f"timing needs at least {2 * inside} B of memory"):
        lines([file, file], 2 * inside - 1, monkeypatch, packed=False)
