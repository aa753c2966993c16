"""lora-fx convert: formats told by content and by name, refusals, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.cli import main
from lora_fx.files.safetensors import write_tensors
from lora_fx.formats.io import format_for, format_of, load_adapter, save_adapter

A, B = (
    np.random.default_rng(i).standard_normal(s).astype("f4") for i, s in ((0, (2, 6)), (1, (8, 2)))
)


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["convert", *argv])
    return int(stop.value.code or 0)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    low = LowRank(A, B, 3.0)
    save_adapter(Adapter({"up_blocks.0.a_b.weight": low}, {"dropout": 0.0}), "start")
    return tmp_path


def test_there_and_back(made: Path, capsys: Any) -> None:
    for source, out, name in (
        ("start", "k.safetensors", "kohya"),
        ("k.safetensors", "d.safetensors", "diffusers"),
        ("d.safetensors", "end", "peft"),
    ):
        assert run(source, "-o", out, "--format", name) == 0
        assert format_of(out) == name
    assert "1 updates, diffusers → peft" in capsys.readouterr().out
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (made / "start" / file).read_bytes() == (made / "end" / file).read_bytes()


def test_json_and_notes(made: Path, capsys: Any) -> None:
    assert run("start", "-o", "x.onnx_adapter", "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["from"] == "peft" and whole["to"] == "onnx_adapter" and whole["updates"] == 1
    assert whole["outputs"] == ["x.onnx_adapter"] and "scales" in whole["warnings"][0]


def test_names_need_the_base(made: Path, capsys: Any) -> None:
    names = {"lora_down.weight": A, "lora_up.weight": B}
    save_file({f"lora_unet_a_b_c.{k}": v for k, v in names.items()}, "k.safetensors")
    assert run("k.safetensors", "-o", "out") == 2
    assert "--base" in capsys.readouterr().err and not Path("out").exists()
    Path("base").mkdir()
    write_tensors(Path("base/model.safetensors"), {"a.b_c.weight": np.zeros((8, 6), "f4")}, {})
    assert run("k.safetensors", "-o", "out", "--base", "base") == 0
    assert list(load_adapter("out")) == ["a.b_c.weight"]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["start", "-o", "x.safetensors"], "--format: peft, kohya"),
        (["start", "-o", "x.bin"], "does not tell the format"),
        (["start", "-o", "x", "--format", "kohya"], "needs a name that ends in .safetensors"),
        (["start", "-o", "x.onnx_adapter", "--format", "peft"], "format peft needs"),
        (["start", "-o", "x.safetensors", "--format", "gguf"], "a name that ends in .gguf"),
        (["start", "-o", "start"], "start exists"),
        (["gone", "-o", "x"], "no such file"),
        (["odd.safetensors", "-o", "x"], "no adapter that is known: its 1 tensors are named odd"),
        (["two.safetensors", "-o", "x"], "could be kohya or torchtune"),
        (["lone.safetensors", "-o", "x"], "no adapter_config.json beside it"),
    ],
)
def test_refused(made: Path, capsys: Any, argv: list[str], word: str) -> None:
    save_file({"odd": A}, "odd.safetensors")
    save_file({"x.lora_a.weight": A, "x.lora_down.weight": A}, "two.safetensors")
    save_file({"x.lora_A.weight": A, "x.lora_B.weight": B}, "lone.safetensors")
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert word in err and err.startswith("Error: ") and err.count("\n") == 2
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before


def test_force(made: Path) -> None:
    Path("x.onnx_adapter").write_bytes(b"old")
    assert run("start", "-o", "x.onnx_adapter") == 2
    assert run("start", "-o", "x.onnx_adapter", "--force") == 0
    assert format_of("x.onnx_adapter") == "onnx_adapter"


def test_formats_that_names_ask_for() -> None:
    assert format_for("pytorch_lora_weights.safetensors") == "diffusers"
    assert format_for("my-adapter-v1.5") == "peft"


def test_needs_no_torch(made: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom lora_fx.cli import main\n"
        "try:\n    main(['convert', 'start', '-o', 'k.safetensors', '--format', 'kohya'])\n"
        "finally:\n    print(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_some_updates_alone(made: Path, capsys: Any) -> None:
    low = LowRank(A, B, 3.0)
    names = [f"model.layers.{i}.{p}_proj.weight" for i in range(2) for p in "qv"]
    save_adapter(Adapter(dict.fromkeys(names, low)), "many")
    rows = [
        (["--include", "q_proj"], {names[0], names[2]}),
        (["--include", "layers.0.*,re:1.v_"], {names[0], names[1], names[3]}),
        (["--exclude", "layers.1.*"], {*names[:2]}),
        (["--include", "q_proj", "--exclude", "layers.1.*"], {names[0]}),
    ]
    for i, (more, kept) in enumerate(rows):
        assert run("many", "-o", f"part{i}", *more) == 0
        assert set(load_adapter(f"part{i}")) == kept
    capsys.readouterr()
    for more, words in (
        (["--include", "k_proj"], "include 'k_proj' matches no parameter"),
        (["--exclude", "*"], "no update of the adapter is left"),
    ):
        assert run("many", "-o", "none", *more) == 2
        assert words in capsys.readouterr().err and not Path("none").exists()
