"""lora-fx extract and truncate: tables, JSON as documented, exit codes, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_fx
from lora_fx.cli import main
from tests.test_docs import documented, everything


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for name in ("base", "tuned"):
        arrays = {"q_proj.weight": (20, 12), "up_proj.weight": (30, 12), "norm.weight": (12,)}
        made = {k: rng.standard_normal(v).astype(np.float32) for k, v in arrays.items()}
        save_file(made, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    out, err = capsys.readouterr()
    code = stop.value.code
    return (code if isinstance(code, int) else 0), out, err


BOTH = "extract base.safetensors tuned.safetensors -o x"


def test_the_whole_way(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, f"{BOTH} --rank 6")
    assert code == 0 and "low-rank updates: 2" in out and "wrote x" in out
    assert "norm.weight" in err and not list(home.glob(".*"))
    code, out, _ = run(capsys, "truncate x -o y.safetensors --rank 2")
    assert code == 0 and "6 → 2" in out
    low = lora_fx.load_adapter("y.safetensors").lowrank["q_proj.weight"]
    assert low.rank == 2 and low.scale == 1.0
    code, _, err = run(capsys, "truncate y.safetensors -o z --rank 8")
    assert code == 0 and "no rank was dropped" in err
    code, _, err = run(capsys, f"{BOTH} --rank 6")
    assert code == 2 and "x already exists" in err
    code, _, _ = run(capsys, f"{BOTH} --energy 0.5 --max-rank 3 --force --include q_proj")
    assert code == 0 and list(lora_fx.load_adapter("x").entries) == ["q_proj.weight"]
    code, _, err = run(capsys, "truncate x -o x --rank 1 --force")
    assert code == 2 and "would replace the input x" in err
    code, _, err = run(capsys, "truncate x -o t --rank 1 --force")
    assert code == 0 and lora_fx.load_adapter("t").lowrank["q_proj.weight"].rank == 1


def test_refusals(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "extract base.safetensors base.safetensors -o x")
    assert code == 1 and "no weight differs" in err
    code, _, err = run(capsys, f"{BOTH} --rank 2 --energy 0.5")
    assert code == 2 and "exclude each other" in err
    code, _, err = run(capsys, f"{BOTH} --exclude nothing")
    assert code == 2 and "Hint: " in err
    code, _, err = run(capsys, "truncate gone -o y --rank 1")
    assert code == 2 and "gone" in err
    assert {p.name for p in home.iterdir()} == {"base.safetensors", "tuned.safetensors"}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("extract", f"{BOTH} --also-full --no-fan-in-fan-out --seed 1 --allow-missing"),
        ("truncate", "truncate x -o y --params 100"),
    ],
)
def test_the_json_is_documented(
    home: Path, capsys: pytest.CaptureFixture[str], name: str, line: str
) -> None:
    if name == "truncate":
        run(capsys, BOTH)
    code, out, _ = run(capsys, f"{line} --json")
    whole: dict[str, Any] = json.loads(out)
    of_table = {"table", "examples"}  # of truncate --table alone
    assert code == 0
    assert set(whole) == documented("Every command") | documented(name) - of_table
    rows = {path: keys for path, keys in everything(whole) if path != "inputs[]"}
    assert list(rows) == [f"{name}ed[]" if name == "extract" else "truncated[]"]
    for path, keys in rows.items():
        assert keys == documented(path)


def test_neither_needs_torch(home: Path) -> None:
    for line in (f"{BOTH} --rank 2", "truncate x -o y --rank 1"):
        code = (
            "import sys\nfrom lora_fx.cli import main\n"
            f"try:\n    main({line.split()!r})\nexcept SystemExit as e:\n    assert not e.code\n"
            "print({'torch', 'onnx', 'transformers'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.rstrip().endswith("set()"), done.stdout + done.stderr
