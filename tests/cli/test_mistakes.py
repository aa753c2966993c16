"""What people get wrong: what is said of it, and its hint, followed to the letter, leads on."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
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
from tests.faults import WRITES, Faults

FACTORIES = """
def bare():
    net = Net()
    net.fc1, net.fc2 = nn.Linear(8, 12, bias=False), nn.Linear(12, 5, bias=False)
    return net.eval(), (torch.randn(3, 8),), {}
def one():
    net = Net()
    net.fc2 = nn.Linear(12, 1)
    return net.eval(), (torch.randn(3, 8),), {}
"""
"""The factories of a model whose weights are base.safetensors, and of one with one output."""
ROOT = Path(__file__).parents[2]
SHAPES = {"fc1.weight": (12, 8), "fc2.weight": (5, 12)}


def onnx_file(path: Path, base: dict[str, Any]) -> None:
    """relu(x @ W1ᵀ) @ W2ᵀ."""
    names = ("fc1.weight", "fc2.weight")
    held = [numpy_helper.from_array(np.ascontiguousarray(base[n]), n) for n in names]
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "fc2.weight"], ["output"], transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    y = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 5])
    graph = helper.make_graph(nodes, "m", [x], [y], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)


def int8_base(folder: Path, base: dict[str, Any]) -> None:
    """The base in codes, as bitsandbytes saves them: weight = codes · SCB / 127."""
    tensors: dict[str, Any] = {}
    for name, weight in base.items():
        largest = np.abs(weight).max(axis=1)
        tensors[name] = np.rint(weight / largest[:, None] * 127).astype("i1")
        tensors[name.replace("weight", "SCB")] = largest
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (folder / "config.json").write_text(json.dumps(config))


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
        "alora": {"alora_invocation_tokens": [5, 7]},
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
    with_nan = x.copy()
    with_nan[6, 2] = np.nan
    np.savez(odd / "nan.npz", x=with_nan, labels=labels)
    np.savez(odd / "ids.npz", x=x[:3], adapter_ids=np.array([0, 1, 9]))
    np.savez(odd / "ids_in_range.npz", x=x[:3], adapter_ids=np.array([0, 1, 1]))
    table = [",".join(f"{value:.3f}" for value in row) + ",1" for row in x]
    table[6] = table[6].replace(table[6].split(",")[2], "")
    (odd / "gap.csv").write_text("a,b,c,d,e,f,g,h,label\n" + "\n".join(table) + "\n")
    np.savez(odd / "renamed.npz", features=x, labels=labels)
    np.savez(odd / "objects.npz", x=x, labels=np.array(["a"] * 40, dtype=object))
    row = json.dumps({"x": x[0].tolist(), "labels": 0}) + "\n"
    (odd / "cut.jsonl").write_text(9 * row + row[:20] + "\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who works with a model of two layers."""
    here = tmp_path_factory.mktemp("here")
    rng = np.random.default_rng(0)
    (here / "model.py").write_text(MODEL + FACTORIES)
    base = {k: rng.standard_normal(s).astype("f") for k, s in SHAPES.items()}
    save_file(base, here / "base.safetensors")
    tuned = {k: v + rng.standard_normal((len(v), 1)).astype("f") for k, v in base.items()}
    save_file(tuned, here / "tuned.safetensors")
    odd = here / "odd"
    odd.mkdir()
    save_file({"fc1.weight": tuned["fc1.weight"]}, odd / "part.safetensors")
    wide = {**tuned, "fc2.weight": np.ones((7, 12), "f")}
    save_file(wide, odd / "wide.safetensors")
    int8_base(here / "int8", base)
    save_adapter(updates(rng, SHAPES), here / "start")
    save_adapter(updates(rng, {"fc1.weight": (12, 7)}), here / "narrow")
    save_adapter(updates(rng, {**SHAPES, "fc7.weight": (5, 12)}), here / "longer")
    lora_fx.merge(here / "base.safetensors", [here / "start"], here / "taken.safetensors")
    onnx_file(here / "m.onnx", base)
    x = rng.standard_normal((40, 8)).astype("f")
    np.savez(here / "data.npz", x=x, labels=np.arange(40) % 5)
    np.savez(here / "inputs.npz", x=x)
    damaged_adapters(here / "start", odd)
    unusual_data(odd, x, np.arange(40) % 5)
    save_adapter(updates(rng, {"encoder.q.weight": (12, 8)}), odd / "other")
    (odd / "notes.txt").write_text("hello\n")
    (odd / "void").mkdir()
    (here / "misspelt.toml").write_text('[merge]\ndtpe = "fp32"\n')
    (here / "one.toml").write_text('[merge]\ndtype = "fp32"\n')
    save_adapter(updates(rng, SHAPES), here / "tilted")
    lora_fx.export(here / "m.onnx", here / "switch.onnx", mode="switch")
    lora_fx.export(here / "m.onnx", here / "batch.onnx", mode="batch", adapters=[here / "start"])
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
    leaves_out = sign == "-" and ("leave it out" in hint or "leave one of them out" in hint)
    assert text.split()[0] in hint or leaves_out, (text, hint)
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


MISSING = {
    "targets timm:resnet18": ("timm", "timm cannot be imported", "pip install timm"),
    "targets hf:org/name": (
        "huggingface_hub",
        "huggingface_hub cannot be imported",
        "pip install 'lora-fx[hf]'",
    ),
    "targets int8": (
        "transformers",
        "transformers cannot be imported",
        "pip install 'lora-fx[hf]'",
    ),
    "convert start -o out.gguf --base llama": (
        "gguf",
        "GGUF needs the package gguf, which is not installed",
        "pip install 'lora-fx[gguf]'",
    ),
}
"""A command line → the package that is not installed, the message, and the hint."""


@pytest.mark.parametrize("line", MISSING)
def test_a_package_that_is_not_installed(
    line: str, home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, message, hint = MISSING[line]
    (home / "llama").mkdir()
    (home / "llama/config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(capsys, line)
    error, told = err.splitlines()
    assert code == 2 and message in error and told == f"Hint: {hint}"

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = re.search(r"\[(\w+)\]", hint)
    wanted = project["optional-dependencies"][extra[1]] if extra else [hint.split()[-1]]
    assert any(name.startswith(package) for name in wanted), (
        "what the hint installs has the package"
    )


def test_an_output_in_a_read_only_folder(home: Path, capsys: Any) -> None:
    line = "merge base.safetensors start -o {}/out.safetensors"
    for folder in ("locked", "open"):
        (home / folder).mkdir()
    with Faults(1, errno.EROFS, only=WRITES - {"open"}, stay=True):
        code, _, err = run(capsys, line.format("locked"))
    error, told = err.splitlines()
    assert code == 2 and "the file system is read-only" in error and "locked" in error
    assert told == "Hint: write to another folder" and not any((home / "locked").iterdir())
    assert run(capsys, line.format("open"))[0] == 0
