"""lora-fx train refuses labels that do not fit the model, before any step, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

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
