"""lora-fx train: what it refuses, what stops it, what it says; a run that stops leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.test_cli import run

MODEL = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 5)
    def forward(self, x, labels=None):
        logits = self.fc2(torch.relu(self.fc1(x)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
def build():
    return Net().eval(), (torch.randn(3, 8),), {}
"""
RIGHT = np.arange(40) % 5


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(labels: np.ndarray, name: str = "labels") -> None:
    x = np.random.default_rng(0).standard_normal((len(labels), 8)).astype(np.float32)
    np.savez("d.npz", x=x, **{name: labels})


@pytest.mark.parametrize("name", ["labels", "y"])  # the model's own loss, and ours
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.where(np.arange(40) == 39, 7, RIGHT), "label 7, but the model scores 5 classes"),
        (np.where(np.arange(40) == 39, -1, RIGHT), "label -1, but the model scores 5 classes"),
        (RIGHT + 0.5, "the labels are fractions such as 0.5; ce needs classes"),
    ],
)
def test_labels_that_are_no_class(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    labels: np.ndarray,
    message: str,
) -> None:
    data(labels, name)
    code, _, err = run(capsys, "train", "model.py:build", "d.npz", "-o", "a", "-r", "2")
    assert code == 2 and message in err and "Hint:" in err and "step" not in err
    assert not (home / "a").exists()


def test_fewer_labels_than_classes_are_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data(RIGHT % 3)
    argv = ("train", "model.py:build", "d.npz", "-o", "a", "-r", "2", "--steps", "2")
    code, _, err = run(capsys, *argv)
    assert code == 0 and "the data has 3 labels, the model scores 5 classes" in err


@pytest.mark.parametrize("option", ["--lr=-1", "--steps=0", "--batch-size=0", "--epochs=0"])
def test_numbers_out_of_range(home: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    data(RIGHT)
    code, _, err = run(capsys, "train", "model.py:build", "d.npz", "-o", "a", option)
    assert code == 2 and "not in the range" in err


def test_a_run_that_stops_writes_nothing_over(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data(RIGHT, "y")
    argv = ("train", "model.py:build", "d.npz", "-o", "a", "-r", "2", "--steps", "4")
    assert run(capsys, *argv)[0] == 0
    before = {p: p.read_bytes() for p in (home / "a").iterdir()}
    (home / "odd.py").write_text(
        "import torch\n"
        "def loss(out, y):\n"  # zero, and its gradient is nan
        "    return torch.sqrt((out['logits'] * 0).square().sum())\n"
    )
    code, out, err = run(capsys, *argv, "--force", "--loss", "odd.py:loss", "--json")
    assert code == 1 and "step 1: the norm of the gradients is nan" in err
    assert "first one that is not finite is the gradient of A of 'fc1.weight'" in err
    assert not json.loads(out)["ok"] and "step 1" in json.loads(out)["error"]
    assert {p: p.read_bytes() for p in (home / "a").iterdir()} == before


def test_patience_and_the_verdict(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data(np.random.default_rng(1).integers(0, 5, 40), "y")  # nothing to learn
    argv = ("train", "model.py:build", "d.npz", "-r", "4", "--steps", "60", "--lr", "0.1")
    code, out, err = run(capsys, *argv, "-o", "a", "--patience", "2")
    told = next(line for line in out.splitlines() if "after step" in line)
    assert code == 0 and "validation loss rose" in told and "patience ended at step" in told
    code, out, _ = run(capsys, *argv, "-o", "b", "--patience", "2", "--json")
    whole = json.loads(out)
    assert whole["verdict"] == told and whole["stopped"] == len(whole["losses"]) < 60
    assert f"kept step {whole['best_step']}, no better than before training;" in told
    code, out, err = run(capsys, *argv, "-o", "c", "--validation", "0", "--json")
    whole = json.loads(out)
    assert whole["stopped"] is None and whole["verdict"].startswith("no validation: overfitting")
    assert "no validation data" in whole["warnings"][-1] and "overfitting would not be seen" in err
    code, _, err = run(capsys, *argv, "-o", "d", "--validation", "0", "--patience", "2")
    assert code == 2 and "--patience needs held-out examples" in err
    assert not (home / "d").exists()


def test_a_tenth_of_every_label_is_held_out(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_fx.held_out

    held: list[np.ndarray] = []
    real = lora_fx.held_out.split

    def seen(*args: Any) -> Any:
        result = real(*args)
        held.append(result[1].columns["labels"])
        return result

    monkeypatch.setattr(lora_fx.held_out, "split", seen)
    data(np.array([0] * 60 + [1] * 30 + [2] * 10))
    for seed in ("0", "0", "1"):
        argv = (
            "train",
            "model.py:build",
            "d.npz",
            "-o",
            f"a{len(held)}",
            "-r",
            "1",
            "--steps",
            "1",
        )
        assert run(capsys, *argv, "--seed", seed)[0] == 0
    assert [np.bincount(h).tolist() for h in held] == [[6, 3, 1]] * 3


def test_two_runs_with_one_seed_write_the_same_bytes(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data(RIGHT)
    argv = ("train", "model.py:build", "d.npz", "-r", "2", "--steps", "12", "--lr", "0.03")
    written = {}
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(capsys, *argv, "--dropout", "0.3", "-o", name, "--seed", seed)[0] == 0
        files = {p.name: p.read_bytes() for p in sorted((home / name).iterdir())}
        written[name] = files
    of_adapter = {"adapter_config.json", "adapter_model.safetensors", "lora_fx_probe.json"}
    assert set(written["a"]) == {*of_adapter, "lora_fx.json"}
    assert written["a"] == written["b"]
    assert written["a"]["adapter_model.safetensors"] != written["c"]["adapter_model.safetensors"]


def test_lora_plus_trains_b_faster(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file

    data(RIGHT)
    argv = ("train", "model.py:build", "d.npz", "-r", "2", "--steps", "1", "--validation", "0")
    moved = {}
    for variant in ("lora", "lora+"):
        done = run(capsys, *argv, "--variant", variant, "-o", variant)
        assert done[0] == 0
        tensors = load_file(home / variant / "adapter_model.safetensors")
        moved[variant] = {k: float(np.abs(v).max()) for k, v in tensors.items() if "lora_B" in k}
    for key, value in moved["lora"].items():  # Adam's first step is the learning rate
        assert moved["lora+"][key] == pytest.approx(16 * value, rel=1e-3)


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
def test_a_start_from_data_with_a_loss_of_ones_own(
    home: Path, capsys: pytest.CaptureFixture[str], init: str
) -> None:
    data(RIGHT, "y")
    (home / "own.py").write_text("def loss(out, y):\n    return out['logits'].square().mean()\n")
    argv = ("train", "model.py:build", "d.npz", "-r", "2", "--steps", "3", "--init", init)
    assert run(capsys, *argv, "--loss", "own.py:loss", "-o", "a")[0] == 0
