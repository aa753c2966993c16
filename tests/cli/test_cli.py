"""The command line as its user sees it: results, refusals, exit codes, nothing left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from lora_fx.cli import main
from lora_fx.onnx import session as sessions
from lora_fx.onnx.session import driver_present

MODEL = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 5)
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))
class Branch(Net):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return super().forward(x)
def build():
    return Net().eval(), (torch.randn(3, 8),), {}
def wrong_inputs():
    return Net().eval(), (torch.randn(3, 9),), {}
def branch():
    return Branch().eval(), (torch.randn(3, 8),), {}
def nothing():
    return nn.ReLU(), (torch.randn(3, 8),), {}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    code = stop.value.code
    return (code if isinstance(code, int) else 0), out, err


def test_the_whole_way(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "targets", "model.py:build")
    assert code == 0 and "fc1.weight" in out and "reach 100.0%" in out
    code, out, _ = run(capsys, "insert", "model.py:build", "-o", "start", "--rank", "2")
    assert code == 0 and "2 targets adapted" in out
    code, out, _ = run(capsys, "export", "model.py:build", "start", "-o", "m.onnx")
    assert code == 0 and "wrote m.onnx" in out and "rel" in out
    assert "changes nothing" in out
    assert driver_present() or "running on CPU" not in out
    code, out, _ = run(capsys, "verify", "m.onnx", "model.py:build", "--adapter", "start")
    assert code == 0 and "verify: ok" in out
    code, out, _ = run(capsys, "verify", "model.py:build", "start")
    assert code == 0
    code, out, _ = run(capsys, "export", "model.py:build", "-o", "base.onnx", "--provider", "cpu")
    assert code == 0
    code, out, _ = run(capsys, "verify", "m.onnx", "base.onnx")
    assert code == 0, "B is zero, so the two files are equal"
    code, out, _ = run(capsys, "insert", "model.py:build", "-o", "m.pt2", "--rank", "2")
    assert code == 0
    program = torch.export.load("m.pt2")
    assert sum("lora_" in n for n in program.state_dict) == 4


def test_different_models_are_exit_1(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = MODEL.replace("manual_seed(0)", "manual_seed(1)")
    (home / "other.py").write_text(other)
    run(capsys, "export", "model.py:build", "-o", "a.onnx", "--provider", "cpu")
    code, out, _ = run(capsys, "verify", "a.onnx", "other.py:build")
    assert code == 1 and "FAILED" in out and "over the gate" in out


COMMON = {"command", "version", "ok", "inputs", "outputs", "warnings"}


def test_json_is_one_object(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["targets", "model.py:build"],
        ["insert", "model.py:build", "-o", "start", "-r", "2"],
        ["export", "model.py:build", "start", "-o", "m.onnx"],
        ["verify", "m.onnx", "model.py:build"],
        ["verify", "model.py:build", "start"],
    ):
        code, out, _ = run(capsys, *argv, "--json")
        data = json.loads(out)
        assert code == 0 and data["ok"] is True and data["command"] == argv[0]
        assert set(data) >= COMMON
    code, out, _ = run(capsys, "targets", "model.py:branch", "--json")
    data = json.loads(out)
    assert code == 2 and data["ok"] is False and "tensor's value" in data["error"]


WRONG = {
    "no target": (["targets", "model.py:nothing"], "no weight matmul"),
    "no target to insert": (["insert", "model.py:nothing", "-o", "out"], "no weight matmul"),
    "a selector without a match": (
        ["insert", "model.py:build", "-o", "out", "--include", "fc3"],
        "'fc3' matches no target",
    ),
    "rank zero": (["insert", "model.py:build", "-o", "out", "-r", "0"], "rank 0"),
    "rank negative": (["insert", "model.py:build", "-o", "out", "-r", "-3"], "rank -3"),
    "rank too high": (["insert", "model.py:build", "-o", "out", "-r", "9"], "rank 9 is larger"),
    "inputs that do not fit": (["targets", "model.py:wrong_inputs"], "cannot capture Net"),
    "a branch on a value": (["export", "model.py:branch", "-o", "m.onnx"], "depends on a tensor's"),
    "output exists": (["insert", "model.py:build", "-o", "taken", "-r", "2"], "exists"),
    "onnx output exists": (["export", "model.py:build", "-o", "taken.onnx"], "exists"),
    "shapes that do not fit": (
        ["export", "model.py:build", "other", "-o", "m.onnx"],
        "expected A [2, 8] and B [12, 2]",
    ),
    "no such adapter": (["export", "model.py:build", "gone", "-o", "m.onnx"], "no such file"),
    "no such model": (["targets", "gone"], "gone"),
    "no such factory": (["targets", "model.py:nope"], "nope"),
    "unknown architecture": (["targets", "folder"], "NoSuchModel"),
    "cuda that is not there": (
        ["export", "model.py:build", "-o", "m.onnx", "--provider", "cuda"],
        "CUDA",
    ),
    "unknown mode": (["export", "model.py:build", "-o", "m.onnx", "--mode", "odd"], "mode 'odd'"),
    "not an onnx name": (["export", "model.py:build", "-o", "m.bin"], "does not end in .onnx"),
    "unknown command": (["tragets", "model.py:build"], "unknown command 'tragets'"),
    "unknown option": (["targets", "model.py:build", "--jsn"], "--jsn"),
    "missing output": (["export", "model.py:build"], "'-o'"),
    "unknown input": (["targets", "model.py:build", "--dynamic", "y:0"], "no input is named 'y'"),
    "bad dynamic": (["targets", "model.py:build", "--dynamic", "x:q"], "is not NAME:DIM"),
    "unreadable inputs": (["targets", "model.py:build", "--inputs", "model.py"], "not a readable"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_a_hint_and_exit_2(
    what: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, message = WRONG[what]
    (home / "taken").mkdir()
    (home / "taken" / "keep").write_text("x")
    (home / "taken.onnx").write_text("x")
    (home / "folder").mkdir()
    (home / "folder" / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    if "other" in argv:
        wide = MODEL.replace("8, 12", "8, 13").replace("12, 5", "13, 5")
        (home / "wide.py").write_text(wide)
        run(capsys, "insert", "wide.py:build", "-o", "other", "-r", "2")
    before = sorted(str(p) for p in home.rglob("*") if "__pycache__" not in str(p))
    code, _, err = run(capsys, *argv)
    lines = [line for line in err.strip().splitlines() if not line.startswith("note:")]
    assert code == 2
    assert len(lines) == 2 and lines[0].startswith("Error: ") and lines[1].startswith("Hint: ")
    assert message in lines[0]
    assert "Traceback" not in err
    assert sorted(str(p) for p in home.rglob("*") if "__pycache__" not in str(p)) == before
    assert (home / "taken.onnx").read_text() == "x"


def test_force_replaces(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "m.onnx").write_text("x")
    code, _, _ = run(capsys, "export", "model.py:build", "-o", "m.onnx", "--force")
    assert code == 0 and (home / "m.onnx").stat().st_size > 100


def test_weights_of_adapters_scale_the_change(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import lora_fx

    run(capsys, "insert", "model.py:build", "-o", "start", "-r", "2")
    adapter = lora_fx.load_adapter("start")
    for u in adapter.lowrank.values():
        u.b[...] = np.random.default_rng(0).standard_normal(u.b.shape)
    lora_fx.save_adapter(adapter, "start", force=True)
    for weight in ("", ":0.5", ":0"):
        name = f"m{weight[1:]}.onnx"
        code, _, _ = run(capsys, "export", "model.py:build", f"start{weight}", "-o", name)
        assert code == 0
    import onnxruntime as ort

    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    got: dict[str, Any] = {
        n: ort.InferenceSession(n, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for n in ("m.onnx", "m0.5.onnx", "m0.onnx")
    }
    assert np.abs(got["m.onnx"] - got["m0.5.onnx"]).max() > 0.01
    code, _, _ = run(capsys, "verify", "m0.onnx", "model.py:build")
    assert code == 0


@pytest.mark.parametrize(
    ("driver", "built", "wanted"),
    [(True, True, "cuda, cpu"), (False, True, "cpu"), (True, False, "cpu")],
)
def test_version_names_the_providers(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    driver: bool,
    built: bool,
    wanted: str,
) -> None:
    there = ["CUDAExecutionProvider"] * built + ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(sessions, "driver_present", lambda: driver)
    code, out, _ = run(capsys, "--version")
    assert code == 0 and {"lora-fx", "torch", "onnx"} <= {w.split()[0] for w in out.splitlines()}
    assert out.splitlines()[-1] == f"providers {wanted}"


def test_version_names_plugins_and_what_never_ran_on_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"onnxruntime": "1.32.0", "onnxruntime-ep-webgpu": "0.4.0"}
    monkeypatch.setattr(
        "lora_fx.cli.group.installed",
        lambda *names: {name: versions[name] for name in names if name in versions},
    )
    _, out, _ = run(capsys, "--version")
    assert "onnxruntime-ep-webgpu 0.4.0" in out.splitlines()
    never_run = "Session(cuda_graph=True), onnxruntime-ep-cuda12 and -cuda13"
    assert f"never run on a GPU: {never_run}" in out.splitlines()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    first = " ".join(out.split("Options:")[0].split())
    assert code == 0 and "graph" in first and "checkpoint files" in first
    for name in ("targets", "insert", "export", "verify", "train", "demo"):
        code, out, _ = run(capsys, name, "--help")
        assert code == 0 and "Usage: lora-fx" in out and "--json" in out


def test_verbose_and_quiet_stand_anywhere(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "targets", "model.py:branch", "-v")
    assert code == 2 and "Traceback" in err and "Error: " in err
    code, out, err = run(capsys, "train", "model.py:build", "gone.npz", "-o", "a", "-q")
    assert code == 2 and err.startswith("Error: ")
    code, out, err = run(capsys)
    assert code == 2 and "Commands:" in out and not err


def test_two_runtimes_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from lora_fx.cli.library_versions import two_runtimes

    monkeypatch.setattr(metadata, "version", lambda name: "1.31")
    assert "both installed" in two_runtimes()


def test_ctrl_c_leaves_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "slow.py").write_text(
        MODEL + "\nimport os, signal, time\n_build = build\ndef build():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    # a test run in the background ignores SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, err = run(capsys, "export", "slow.py:build", "-o", "m.onnx")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert "interrupted" in err and "Traceback" not in err
    assert not list(home.glob("*.onnx")) and not list(home.glob(".*"))


def test_an_interrupt_while_writing_leaves_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_fx.passes.verbs.export_merged as export_merged

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_merged, "open_session", stop)  # the file is written, not yet named
    code, _, err = run(capsys, "export", "model.py:build", "-o", "m.onnx")
    assert code == 130 and "nothing was left behind" in err
    assert not list(home.glob("*.onnx")) and not list(home.glob(".*"))


def test_a_wrong_result_is_exit_1_and_not_written(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_fx.onnx.session as session

    real = session.RuntimeSession.run
    monkeypatch.setattr(
        session.RuntimeSession,
        "run",
        lambda self, feeds: {k: v * 1.001 for k, v in real(self, feeds).items()},
    )
    code, _, err = run(capsys, "export", "model.py:build", "-o", "m.onnx")
    assert code == 1 and "ONNX Runtime differs from torch" in err
    assert not list(home.glob("*.onnx")) and not list(home.glob(".*"))
