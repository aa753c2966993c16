"""What people get wrong: what is said of it, and its hint, followed to the letter, leads on."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.cli import main
from lora_fx.formats.io import save_adapter
from tests.cli.test_cli import MODEL

SHAPES = {"fc1.weight": (12, 8), "fc2.weight": (5, 12)}


def onnx_file(path: Path, base: dict[str, Any]) -> None:
    """relu(x @ W1ᵀ) @ W2ᵀ."""
    names = ("fc1.weight", "fc2.weight")
    held = [numpy_helper.from_array(np.ascontiguousarray(base[n]), n) for n in names]
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "fc2.weight"], ["y"], transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])
    graph = helper.make_graph(nodes, "m", [x], [y], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)


def updates(rng: np.random.Generator, shapes: dict[str, tuple[int, int]]) -> Adapter:
    entries = {}
    for key, (rows, columns) in shapes.items():
        a, b = rng.standard_normal((2, columns)), rng.standard_normal((rows, 2))
        entries[key] = LowRank(a.astype("f"), b.astype("f"), alpha=6.0)
    return Adapter(entries)


def damaged_adapters(start: Path, odd: Path) -> None:
    """Copies of the adapter in start, each with one thing wrong, as folders in odd."""
    configs: dict[str, dict[str, Any]] = {
        "worded": {"r": "two"},
        "unscaled": {"lora_alpha": None},
        "rank3": {"r": 3},
    }
    names = ["bare", "hollow", "cut", "gaps", "half", "whole_numbers", "comma", "pickled", "a b"]
    for name in [*configs, *names, "typed"]:
        shutil.copytree(start, odd / name)
    for name, changes in {**configs, "typed": {"peft_type": "LORRA"}}.items():
        config = json.loads((start / "adapter_config.json").read_text())
        (odd / name / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    tensors = load_file(start / "adapter_model.safetensors")
    first = min(tensors)
    (odd / "bare/adapter_config.json").unlink()
    (odd / "hollow/adapter_model.safetensors").unlink()
    (odd / "comma/adapter_config.json").write_text('{"r": 2,}')
    cut = odd / "cut/adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    gaps = {**tensors, first: np.full_like(tensors[first], np.nan)}
    save_file(gaps, odd / "gaps/adapter_model.safetensors")
    half = {key: tensor for key, tensor in tensors.items() if key != first}
    save_file(half, odd / "half/adapter_model.safetensors")
    whole = {key: tensor.astype("i4") for key, tensor in tensors.items()}
    save_file(whole, odd / "whole_numbers/adapter_model.safetensors")
    (odd / "pickled/adapter_model.safetensors").unlink()
    state = {key: torch.from_numpy(tensor) for key, tensor in tensors.items()}
    torch.save(state, odd / "pickled/adapter_model.bin")


def unusual_data(odd: Path, x: np.ndarray, labels: np.ndarray) -> None:
    """Data files that cannot be trained on, in odd."""
    np.savez(odd / "empty.npz", x=x[:0], labels=labels[:0])
    np.savez(odd / "uneven.npz", x=x, labels=labels[:30])
    np.savez(odd / "high.npz", x=x, labels=labels + 1)
    np.savez(odd / "negative.npz", x=x, labels=labels - 1)
    np.savez(odd / "fractions.npz", x=x, labels=labels + 0.5)
    np.savez(odd / "renamed.npz", features=x, labels=labels)
    np.savez(odd / "objects.npz", x=x, labels=np.array(["a"] * 40, dtype=object))
    row = json.dumps({"x": x[0].tolist(), "labels": 0}) + "\n"
    (odd / "cut.jsonl").write_text(9 * row + row[:20] + "\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who works with a model of two layers."""
    here = tmp_path_factory.mktemp("here")
    rng = np.random.default_rng(0)
    (here / "model.py").write_text(MODEL)
    base = {k: rng.standard_normal(s).astype("f") for k, s in SHAPES.items()}
    save_file(base, here / "base.safetensors")
    tuned = {k: v + rng.standard_normal((len(v), 1)).astype("f") for k, v in base.items()}
    save_file(tuned, here / "tuned.safetensors")
    save_adapter(updates(rng, SHAPES), here / "start")
    save_adapter(updates(rng, {"fc1.weight": (12, 7)}), here / "narrow")
    save_adapter(updates(rng, {**SHAPES, "fc7.weight": (5, 12)}), here / "longer")
    lora_fx.merge(here / "base.safetensors", [here / "start"], here / "taken.safetensors")
    onnx_file(here / "m.onnx", base)
    x = rng.standard_normal((40, 8)).astype("f")
    np.savez(here / "data.npz", x=x, labels=np.arange(40) % 5)
    np.savez(here / "inputs.npz", x=x)
    odd = here / "odd"
    odd.mkdir()
    damaged_adapters(here / "start", odd)
    unusual_data(odd, x, np.arange(40) % 5)
    save_adapter(updates(rng, {"encoder.q.weight": (12, 8)}), odd / "other")
    (odd / "notes.txt").write_text("hello\n")
    (odd / "void").mkdir()
    (here / "typo.toml").write_text('[merge]\ndtpe = "fp32"\n')
    (here / "one.toml").write_text('[merge]\ndtype = "fp32"\n')
    shutil.copytree(here / "start", here / "second")
    lora_fx.export(here / "m.onnx", here / "switch.onnx", mode="switch")
    return here


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, which a row may change, as the current one."""
    here = tmp_path / "home"
    shutil.copytree(made, here)
    monkeypatch.chdir(here)
    return here


Row = tuple[str, str, str, str]
"""A line of mistakes.txt, which says what its parts are."""


def rows(slow: bool) -> list[Row]:
    """The quick rows of mistakes.txt, or those below its last comment."""
    text = Path(__file__).with_name("mistakes.txt").read_text(encoding="utf-8")
    quick, _, rest = text.partition("# With a model")
    lines = [x for x in (rest if slow else quick).splitlines() if " | " in x and x[0] != "#"]
    parts = [[*line.split(" | "), ""] for line in lines]
    return [(p[0], p[1], p[2], p[3]) for p in parts]


QUICK, SLOW = rows(False), rows(True)


def followed(line: str, way: str, hint: str) -> str:
    """The command line that the hint asks for; mistakes.txt says what the signs mean."""
    if way.startswith("~ "):
        return way[2:]
    if way.startswith("! "):
        subprocess.run(way[2:], shell=True, check=True)
        return line
    old, arrow, new = way.partition(" → ")
    if arrow:
        assert new in hint and old in line, (new, hint)
        return line.replace(old, new)
    sign, text = way[0], way[2:]
    named = text.split()[0] if sign in "+=" else text
    assert named in hint or (sign == "-" and "leave it out" in hint), (text, hint)
    return {"+": f"{line} {text}", "-": line.replace(f" {text}", ""), "=": text}[sign]


OF_PYTHON = re.compile(r"\w=[\[{'(]|=(True|False|None)\b|\blora_fx\.\w+\(")
"""What a hint has that is written for Python alone."""


def run(capsys: Any, line: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["-q", *shlex.split(line)])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.mark.parametrize("row", QUICK, ids=[r[0] for r in QUICK])
def test_a_mistake_is_told_and_its_hint_leads_on(row: Row, home: Path, capsys: Any) -> None:
    check(row, home, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("row", SLOW, ids=[r[0] for r in SLOW])
def test_a_mistake_with_a_model(row: Row, home: Path, capsys: Any) -> None:
    check(row, home, capsys)


def listed(home: Path) -> set[Path]:
    """What is there, but Python's own of model.py."""
    return {p for p in home.iterdir() if p.name != "__pycache__"}


def check(row: Row, home: Path, capsys: Any) -> None:
    line, message, hint, way = row
    before = listed(home)
    code, out, err = run(capsys, line)
    said = err.splitlines()
    assert code in (1, 2) and len(said) == 2 and not out, err
    assert said[0].startswith("Error: ") and message in said[0], err
    assert said[1].startswith("Hint: ") and hint in said[1], err
    assert not OF_PYTHON.search(said[1]), "the hint is for the command line"
    assert listed(home) == before, "nothing was written"
    if way:
        then = followed(line, way, said[1])
        code, _, err = run(capsys, then)
        verdict = line.startswith(("doctor", "verify"))
        assert code == 0 or (verdict and code == 1), f"{then}: {err}"
