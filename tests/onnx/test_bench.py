"""bench: what it runs, how often, and what it reports; no time is checked."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.onnx.bench import bench
from lora_fx.onnx.session import RuntimeSession


def matmul(path: Path, columns: int = 3) -> str:
    w = np.arange(4 * columns, dtype=np.float32).reshape(4, columns)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", columns])],
        [numpy_helper.from_array(w, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )
    return str(path)


def test_rows_counts_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = matmul(tmp_path / "a.onnx"), matmul(tmp_path / "b.onnx", 5)
    monkeypatch.setattr("lora_fx.onnx.bench.SAMPLE_SECONDS", 0.0)
    ran: list[tuple[int, ...]] = []
    real = RuntimeSession.run

    def run(self: RuntimeSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ran.append(feeds["x"].shape)
        return real(self, feeds)

    monkeypatch.setattr(RuntimeSession, "run", run)
    found = bench([a, b, a], sizes=[(2, 3), (5, 1), (2, 3)], rounds=4, warmup=1)
    assert [t.sizes for t in found] == [{"x": (2, 3, 4)}, {"x": (5, 1, 4)}]
    for t in found:
        assert list(t.samples) == [a, f"{a} (again)", b, f"{a} (3)"]
        assert t.repeats == 1 and all(len(s) == 4 for s in t.samples.values())
        assert t.rows()[0]["cpu"]["ratio"] == t.rows()[0]["wall"]["min_ratio"] == 1.0
    each = 4 * (2 + 1 + 4)  # four sessions: two calls to see how long one takes, warm-up, rounds
    assert ran == [(2, 3, 4)] * each + [(5, 1, 4)] * each


def test_real_inputs_are_one_size(tmp_path: Path) -> None:
    x = np.ones((1, 7, 4), np.float32)
    found = bench([matmul(tmp_path / "a.onnx")], inputs={"x": x}, rounds=1)
    assert [t.sizes for t in found] == [{"x": (1, 7, 4)}]


def test_refusals(tmp_path: Path) -> None:
    a = matmul(tmp_path / "a.onnx")
    with pytest.raises(LoraFxError, match="does not run at x"):
        bench([a], inputs={"x": np.ones((1, 7, 5), np.float32)})
    with pytest.raises(LoraFxError, match="no input is named z"):
        bench([a], inputs={"z": np.ones(1)})
    with pytest.raises(LoraFxError, match="rounds is 0"):
        bench([a], rounds=0)
    with pytest.raises(LoraFxError, match="cannot be read"):
        bench([tmp_path / "none.onnx"])
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("m/data", "x")
    with pytest.raises(LoraFxError, match=r"m\.pt2: a zip archive, such as a \.pt2"):
        bench([tmp_path / "m.pt2"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = matmul(tmp_path / "a.onnx")
    with pytest.raises(SystemExit) as done:
        main(["bench", a, "--size", "2,3", "--rounds", "6", "--threads", "2", "--json"])
    assert done.value.code == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["command"], got["rounds"], got["threads"]) == ("bench", 6, 2)
    (timing,) = got["timings"]
    assert timing["sizes"] == {"x": [2, 3, 4]} and len(timing["rows"]) == 2
    assert timing["rows"][0]["cpu"]["lower"] == timing["rows"][0]["cpu"]["upper"] == 1.0
    for size in ("3", "a,b", "0,4"):
        with pytest.raises(SystemExit) as done:
            main(["bench", a, "--size", size])
        assert done.value.code == 2 and "--size" in capsys.readouterr().err


def test_the_table(tmp_path: Path) -> None:
    """Names are as wide as the widest; an interval stands where there are six rounds."""
    paths = [matmul(tmp_path / "a.onnx"), matmul(tmp_path / "wider.onnx")]
    for rounds in (1, 6):
        (timings,) = bench(paths, sizes=[(2, 3)], rounds=rounds)
        title, head, *rows = str(timings).splitlines()
        assert title == f"x [2, 3, 4] ({timings.repeats} runs a sample)"
        assert head.split()[:5] == ["ms", "cpu", "min", "ratio", "min"] and len(rows) == 3
        width = max(map(len, timings.samples))
        for name, row in zip(timings.samples, rows, strict=True):
            assert row[2 : 2 + width].rstrip() == name
            assert len(row[2 + width :].split()) == 7 + (rounds == 6)


def test_no_file() -> None:
    with pytest.raises(LoraFxError, match="no file to measure"):
        bench([])
