"""lora-fx train: larger batches, held-out files, curves, and how many states are kept."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.test_cli import run
from tests.cli.test_train_cli import MODEL

TRAIN = ("train", "model.py:build", "d.npz", "-r", "2", "--lr", "0.03", "--steps", "6")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    for name, rows in (("d", 48), ("held", 12)):
        x = np.random.default_rng(rows).standard_normal((rows, 8)).astype(np.float32)
        np.savez(f"{name}.npz", x=x, labels=x[:, :5].argmax(1))
    np.savez("other.npz", x=x, y=x[:, :5].argmax(1))
    return tmp_path


def losses(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    code, out, err = run(capsys, *TRAIN, *argv, "--json", "--force")
    assert code == 0, err
    return json.loads(out)


def test_batches_that_are_accumulated_are_one_larger_batch(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = ("--eval-data", "held.npz")
    argv = ("-o", "a", *held, "--batch-size", "4", "--gradient-accumulation-steps", "3")
    parts = losses(capsys, *argv, "--curve", "curve.csv", "--save-state", "s")
    ran = json.loads((home / "s" / "state.json").read_text())["facts"]["settings"]
    assert (ran["batch_size"], ran["accumulate"]) == (12, 3), "three parts of four"
    whole = losses(capsys, "-o", "a", *held, "--batch-size", "12")
    small = losses(capsys, "-o", "a", *held, "--batch-size", "4")
    assert parts["losses"] == pytest.approx(whole["losses"], abs=2e-6)
    assert small["losses"] != pytest.approx(whole["losses"], abs=1e-2)
    assert parts["examples"] == {"training": 48, "validation": 12}
    assert parts["outputs"] == ["a", "curve.csv"]
    with (home / "curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert [int(row["step"]) for row in curve] == list(range(7))
    assert [float(row["loss"]) for row in curve[1:]] == pytest.approx(parts["losses"], abs=1e-6)
    losses(capsys, "-o", "b", *argv[2:], "--resume", "s", "--curve", "again.csv")
    assert (home / "again.csv").read_text() == (home / "curve.csv").read_text()
    checked = {row["step"]: float(row["validation"]) for row in curve if row["validation"]}
    assert checked == pytest.approx({"0": parts["before"], **parts["validation"]}, abs=1e-6)


def test_held_out_examples_that_are_trained_on_are_said(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load("d.npz") as d, np.load("held.npz") as held:
        mixed = {name: np.concatenate([held[name], d[name][5:8]]) for name in d}
    mixed["labels"][-1] = (mixed["labels"][-1] + 1) % 5  # another label makes it no other example
    np.savez("mixed.npz", **mixed)
    told = losses(capsys, "-o", "a", "--eval-data", "mixed.npz", "--steps", "1")
    said = "mixed.npz: 3 of 15 examples are trained on too, from d.npz"
    assert any(said in warning for warning in told["warnings"])
    told = losses(capsys, "-o", "a", "--eval-data", "held.npz", "--steps", "1")
    assert not any("trained on too" in warning for warning in told["warnings"])


def test_refusals(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "mine.csv").write_text("a,b\n1,2\n")
    (home / "old.csv").write_text("step,loss,validation\n1,2,3\n")
    for argv, message in (
        (("--eval-data", "other.npz"), "other.npz has x, y; expected labels, x, as in d.npz"),
        (("--eval-data", "held.npz", "--validation", "0.2"), "--validation has no effect with"),
        (("--schedule", "cosin"), "unknown schedule 'cosin'"),
        (("--optimizer", "adam"), "unknown optimizer 'adam'"),
        (
            ("--schedule", "constant", "--warmup", "0.1"),
            "--warmup has no effect for --schedule const",
        ),
        (("--save-total-limit", "2"), "--save-total-limit needs a folder for states"),
        (("--curve", "mine.csv", "--force"), "mine.csv: --force does not replace it"),
        (("--eval-data", "old.csv", "--curve", "old.csv", "--force"), "replace the input old.csv"),
        (("--seed", "-1"), "'--seed': -1 is not in the range"),
        (("--eval-data", "hf:org/d"), "hf:org/d: lora-fx does not read data from the Hub"),
        (("--curve", "a"), "--curve a is also --output a"),
        (("--curve", "a/c.csv"), "--curve a/c.csv is inside --output a"),
        (("--report", "a/sub/r.html"), "--report a/sub/r.html is inside --output a"),
        (("--save-state", "./a"), "--save-state ./a is also --output a"),
        (("--save-state", "s", "--curve", "s"), "--save-state s is also --curve s"),
        (("--report", "r.html", "--curve", "r.html"), "--curve r.html is also --report r.html"),
        (("--curve", "c.toml", "--save-config", "c.toml"), "--save-config c.toml is also --curve"),
    ):
        code, out, err = run(capsys, *TRAIN, "-o", "a", *argv)
        assert code == 2 and message in err and "Hint:" in err and not out, (argv, err)
        assert not (home / "a").exists()


def test_the_last_states_are_kept(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = ("--save-every", "2", "--save-total-limit", "2")
    losses(capsys, "-o", "a", "--save-state", "s", *keep)
    assert {p.name for p in (home / "s").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    want = (home / "a" / "adapter_model.safetensors").read_bytes()
    told = losses(capsys, "-o", "b", "--resume", "s/checkpoint-4", "--save-state", "t")
    assert told["resumed"] == 4 and (home / "t" / "state.json").is_file()
    assert (home / "b" / "adapter_model.safetensors").read_bytes() == want
    assert losses(capsys, "-o", "b", "--resume", "s", *keep)["resumed"] == 6
    for argv, message in (
        (
            ("--save-state", "s", *keep, "--force"),
            "s already holds states of a run, the last is checkpoint-6",
        ),
        (("--resume", "s"), "s already holds states of a run"),
        (
            ("--resume", "s/checkpoint-4"),
            "s/checkpoint-4 is a single state, which is not overwritten",
        ),
        (("--resume", "t", *keep), "t is a single state, which is not overwritten"),
    ):
        code, _, err = run(capsys, *TRAIN, "-o", "c", *argv)
        assert code == 2 and message in err, err
    assert {p.name for p in (home / "s").iterdir()} == {"checkpoint-4", "checkpoint-6"}
