"""lora-fx train --save-state and --resume: killed runs go on, and write what whole ones write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_fx.files import atomic
from tests.cli.test_cli import run
from tests.cli.test_train_cli import MODEL

STOPS = """
import os, signal, time
import lora_fx.files.atomic as osfile

calls = []

def swap(*args, real=osfile._swap):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.{how})
        time.sleep(60)
    real(*args)

osfile._swap = swap
"""
"""sitecustomize of a run that is stopped before its third state gets its name."""
TRAIN = ("train", "model.py:build", "d.npz", "-r", "2", "--steps", "30", "--lr", "0.03",
         "--dropout", "0.2", "--save-every", "4")  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, labels=x[:, :5].argmax(1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def killed(site: Path) -> int:
    """The exit code of a run that is killed while it writes its third state."""
    (site / "sitecustomize.py").write_text(STOPS.format(how="SIGKILL"))
    path = os.pathsep.join([str(site), str(Path(__file__).resolve().parents[2])])
    command = [sys.executable, "-m", "lora_fx.cli", *TRAIN, "-o", "a", "--save-state", "state"]
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, stderr=subprocess.DEVNULL, env=env, timeout=900).returncode


@pytest.mark.parametrize("how", ["SIGTERM", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on(
    home: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    if how == "SIGKILL":
        assert killed(tmp_path_factory.mktemp("site")) == -signal.SIGKILL
    else:
        with monkeypatch.context() as patched:
            patched.setattr(atomic, "_swap", atomic._swap)
            exec(STOPS.format(how=how), {})
            code, _, err = run(capsys, *TRAIN, "-o", "a", "--save-state", "state")
        assert code == 143 and "nothing was left behind" not in err
        assert "state holds the state of step 8: --resume state goes on from there" in err
        assert {p.name for p in home.iterdir() if p.name[0] == "."} == set()
    assert json.loads((home / "state" / "state.json").read_text())["step"] == 8
    assert not (home / "a").exists()
    assert run(capsys, *TRAIN, "-o", "whole", "--save-state", "other")[0] == 0
    code, out, err = run(capsys, *TRAIN, "-o", "a", "--resume", "state", "--json")
    assert code == 0 and json.loads(out)["resumed"] == 8 and len(json.loads(out)["losses"]) == 30
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (home / "a" / name).read_bytes() == (home / "whole" / name).read_bytes()
    name = "state.safetensors"
    assert (home / "state" / name).read_bytes() == (home / "other" / name).read_bytes()
    assert not [p for p in home.iterdir() if p.name.endswith(".tmp")]


def test_refusals(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = (*TRAIN[:-2], "--steps", "4", "-o")
    code, out, _ = run(capsys, *short, "a", "--save-state", "state")
    assert code == 0 and "resumed at" not in out
    held = {p: p.read_bytes() for p in (home / "state").iterdir()}
    code, _, err = run(capsys, *short, "b", "--resume", "state", "--lr", "0.01")
    assert (
        code == 2
        and "settings: lr: 0.03 in the state, 0.01 now" in err
        and "Hint: resume it" in err
    )
    code, _, err = run(capsys, *short, "b", "--save-state", "state")
    assert code == 2 and "state exists" in err
    (home / "mine").mkdir()
    (home / "mine" / "thesis.txt").write_text("x")
    code, _, err = run(capsys, *short, "b", "--save-state", "mine", "--force")
    assert code == 2 and "holds files that lora-fx did not write: thesis.txt" in err
    code, _, err = run(capsys, *short, "b", "--resume", "mine")
    assert code == 2 and "mine: the folder holds files that lora-fx did not write" in err
    code, _, err = run(capsys, *short, "b", "--resume", "gone")
    assert code == 2 and "gone is not a training state" in err
    code, _, err = run(capsys, *short, "b", "--save-every", "2")
    assert code == 2 and "--save-every needs a folder for states" in err
    assert not (home / "b").exists() and not (home / "gone").exists()
    assert {p: p.read_bytes() for p in (home / "state").iterdir()} == held
    code, out, _ = run(capsys, *short, "b", "--resume", "state")
    assert code == 0 and "(resumed at step 4)" in out
