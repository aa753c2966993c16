"""--attest: a statement names the files by their bytes, and says what was proven."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import lora_fx
from tests.cli.test_cli import MODEL, run
from tests.probe.model import adapters, encoder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def named(rows: list[Any]) -> dict[str, str]:
    return {row["name"]: row["digest"]["sha256"] for row in rows}


def test_an_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["export", "model.py:build", "-o", "m.onnx", "--provider", "cpu", "--attest", "s.json"]
    code, out, err = run(capsys, *argv)
    assert not code and "wrote s.json" in err, out + err
    statement = json.loads(Path("s.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "urn:lora-fx:result:v1"
    assert named(statement["subject"]) == {"m.onnx": digest(folder / "m.onnx")}
    predicate = statement["predicate"]
    assert predicate["command"] == ["lora-fx", *argv]
    assert named(predicate["materials"]) == {"model.py": digest(folder / "model.py")}
    assert predicate["result"]["ok"] and predicate["result"]["parity"]


def test_a_check_names_what_it_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights in a data file are hashed too; a failure is stated like a success."""
    model, ids = encoder()
    lora_fx.export(model, "m.onnx", (ids,), adapters=adapters(), mode="switch", external_over=0)
    code, _, _ = run(capsys, "verify", "m.onnx", "--provider", "cpu", "--attest", "s.json")
    assert not code
    statement = json.loads(Path("s.json").read_text())
    files = ["m.onnx", "m.onnx.data", "de.onnx_adapter", "fr.onnx_adapter"]
    assert named(statement["subject"]) == {name: digest(folder / name) for name in files}
    result = statement["predicate"]["result"]
    assert [row["verdict"] for row in result["verdicts"]] == ["right", "right", "right"]
    base = result["probe"]["facts"]["base"]
    assert base["name"] == "Encoder" and len(base["sample"]) == 64

    (folder / "fr.onnx_adapter").write_bytes((folder / "de.onnx_adapter").read_bytes())
    argv = ["verify", "m.onnx", "--provider", "cpu", "--attest", "t.json"]
    code, _, _ = run(capsys, *argv)
    assert code == 1
    result = json.loads(Path("t.json").read_text())["predicate"]["result"]
    assert not result["ok"]
    assert result["verdicts"][2]["verdict"] == "adapter de"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s.txt", "does not end in .json"),
        ("there.json", "already exists"),
        ("folder.json", "already exists"),
    ],
)
def test_a_statement_that_cannot_be_written(
    folder: Path, capsys: pytest.CaptureFixture[str], path: str, message: str
) -> None:
    (folder / "there.json").write_text("{}")
    (folder / "folder.json").mkdir()
    before = sorted(folder.iterdir())
    argv = ["export", "model.py:build", "-o", "m.onnx", "--provider", "cpu", "--attest", path]
    code, _, err = run(capsys, *argv)
    assert code == 2 and message in err
    assert sorted(folder.iterdir()) == before
