"""The documentation's code runs and prints what it says; what it lists is what there is.

Blocks of a page run in order, in one folder and one namespace:

    ```python                    run; a ```text block right after it is what it prints
    ```python title="model.py"   written to that file, not run; so is ```toml title="run.toml"
    ```console                   `$ lora-fx …` lines run, and the lines below are the output
    ```sh, ```json, ```text      not run

A command line may end in `# exit 2`. In expected output a line of `…` stands for any lines, and
differences such as 1.2e-07, which depend on the machine, compare as equal.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import lora_fx
from lora_fx.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "passes" / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.M | re.S)
LANGUAGES = {"python", "console", "sh", "text", "json", "toml"}
JSON = (DOCS / "json.md").read_text()


@dataclass(frozen=True)
class Block:
    """A fenced block: language, the rest of the fence's line, text, line number."""

    language: str
    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m[1], m[2].strip(), m[3], text.count("\n", 0, m.start()) + 1)
        for m in FENCE.finditer(text)
    ]


def command(line: str) -> tuple[int, str]:
    """(exit code, stdout and stderr as a terminal shows them) of `lora-fx …`."""
    argv = shlex.split(line)
    assert argv[0] == "lora-fx", f"only lora-fx runs in console blocks: {line}"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            main(argv[1:])
        except SystemExit as e:
            return (e.code if isinstance(e.code, int) else 0), shown.getvalue()
    raise AssertionError("main always exits")


def expect(want: str, got: str, where: str) -> None:
    """Raise unless `got` is `want`, up to `…` lines and machine-dependent differences."""
    differences = re.compile(r"\b\d\.\d+e[-+]\d+")
    pattern = ""
    for line in want.strip().splitlines():
        gap = line.strip() == "…"
        pattern += "(?s:.*\n)?" if gap else re.escape(differences.sub("#", line.rstrip())) + "\n"
    text = "".join(differences.sub("#", x.rstrip()) + "\n" for x in got.strip().splitlines())
    if not re.fullmatch(pattern, text):
        pytest.fail(f"{where} prints\n{got}\nbut the page says\n{want}", pytrace=False)


def console(block: Block, where: str) -> None:
    """Run every `$` line and compare what it prints with the lines below it."""
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        line, _, want = part.partition("\n")
        line, _, code = line.partition(" # exit ")
        got = command(line.strip())
        assert got[0] == int(code or 0), f"{where}: {line}: exit {got[0]}\n{got[1]}"
        if want.strip():
            expect(want, got[1], f"{where}: {line}")


def run_page(page: Path) -> dict[str, Any]:
    """Run a page in the current folder; returns its namespace."""
    names: dict[str, Any] = {"__name__": page.stem}
    printed: str | None = None
    torch.manual_seed(0)
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.language in ("python", "toml") and block.info:
            title = re.fullmatch(r'title="([\w./]+)"', block.info)
            assert title, f"{where}: {block.info}"
            Path(title[1]).write_text(block.text)
        elif block.language == "python":
            shown = io.StringIO()
            code = "\n" * block.line + block.text
            with contextlib.redirect_stdout(shown):
                exec(compile(code, where, "exec"), names)
            printed = shown.getvalue()
            continue
        elif block.language == "text" and not block.info and printed is not None:
            expect(block.text, printed, where)
        elif block.language == "console":
            console(block, where)
        printed = None
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert {b.language for b in blocks(page)} <= LANGUAGES
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a fence of an unknown form"
    before = set(sys.modules)
    try:
        with torch.random.fork_rng(devices=[]):
            run_page(page)
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


def test_the_graphs_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two graphs are printed graphs, one line a node: name = op(operands)."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "README.md"
    shown = {b.info: b.text for b in blocks(page) if b.info.startswith("graph")}
    first = next(b for b in blocks(page) if b.language == "python")
    names: dict[str, Any] = {}
    exec(compile(first.text, str(page), "exec"), names)
    assert shown["graph before"] == f"{names['before']}\n"
    assert shown["graph after"] == f"{names['after']}\n"


# --- docs/json.md: what is documented is what is emitted -----------------------------------------

MODEL = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.deep = nn.Conv1d(2, 2, 3, groups=2, padding=1)
        self.extra = nn.Parameter(torch.randn(3, 3))
    def forward(self, x):
        return self.fc(self.deep(x)) + self.extra.sum()
def build():
    return Net(), (torch.randn(2, 2, 4),), {}
"""
DATA = {"x": np.zeros((20, 2, 4), np.float32), "labels": np.arange(40).reshape(20, 2) % 3}
RUNS = {
    "targets": ["targets model.py:build"],
    "insert": ["insert model.py:build -o start --rank 2"],
    "train": [
        "train model.py:build data.npz -o tuned --rank 2 --steps 2",
        "train model.py:build data.npz -o swept --sweep rank=1,2 --steps 2",
    ],
    "merge": [
        "merge base.safetensors tuned -o merged.safetensors --any-base --dry-run",
        "merge base.safetensors tuned -o merged.safetensors --any-base",
    ],
    "export": [
        "export model.py:build start -o m.onnx --provider cpu --optimise --target cuda",
        "export model.py:build -o step.onnx --provider cpu --mode train --rank 2",
    ],
    "bench": ["bench m.onnx --rounds 1"],
    "convert": ["convert start -o start.onnx_adapter"],
    "verify": [
        "verify m.onnx model.py:build --provider cpu",
        "verify model.py:build start",
        "verify pair.safetensors pair.safetensors",
        "verify m.onnx --provider cpu",
        "verify made.safetensors pair.safetensors --adapter pair",
    ],
    "doctor": ["doctor pair.safetensors pair"],
    "probe": ["probe start --base model.py:build -o probe.json"],
}


def documented(title: str) -> set[str]:
    """The names in the first column of the table under a heading of docs/json.md."""
    part = re.search(rf"^#+ `?{re.escape(title)}`?$(.*?)(?=^#|\Z)", JSON, re.M | re.S)
    assert part, f"docs/json.md has no heading {title}"
    return set(re.findall(r"^\| `(\w+)`", part[1], re.M))


def everything(value: Any, path: str = "") -> Iterator[tuple[str, set[str]]]:
    """(path of a row, its keys) for every object inside the whole."""
    for key, inner in value.items():
        if isinstance(inner, list):
            for row in inner:
                if isinstance(row, dict):
                    yield f"{key}[]", set(row)


def test_the_json_of_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    np.savez("data.npz", **DATA)
    save_file({"fc.weight": np.ones((3, 4), np.float32)}, "base.safetensors")
    save_file({"w": np.ones((3, 2), np.float32)}, "pair.safetensors")
    update = lora_fx.LowRank(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 0.5)
    lora_fx.save_adapter(lora_fx.Adapter({"w": update}), "pair")
    lora_fx.merge("pair.safetensors", "pair", "made.safetensors")
    rows: dict[str, set[str]] = {}
    for name, lines in RUNS.items():
        emitted: set[str] = set()
        for line in lines:
            out = io.StringIO()
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(io.StringIO()),
                pytest.raises(SystemExit) as stop,
            ):
                main([*line.split(), "--json"])
            assert not stop.value.code, f"{line}: {out.getvalue()}"
            whole = json.loads(out.getvalue())
            assert documented("Every command") <= set(whole), line
            emitted |= set(whole)
            for path, keys in everything(whole):
                assert rows.setdefault(path, keys) == keys or path == "inputs[]", path
        fields = documented("Every command") | documented(name)
        assert emitted <= fields, name
        # which are there with their provider, their mode, or such tensors alone
        of_whole_tensors = {"whole_tensors", "replaced"}
        assert fields - emitted <= {"webgpu", "ids", "server", "served", *of_whole_tensors}, name
    assert "condition" not in rows["ranges[]"]  # it is there in place of bounds alone
    for path, keys in rows.items():
        if path == "ranges[]":
            keys = keys | {"condition"}
        assert path == "inputs[]" or keys == documented(path), path
    assert {"targets[]", "refusals[]", "unreached[]", "pinned[]", "parity[]", "tensors[]"} <= set(
        rows
    )


def test_the_json_of_the_demo() -> None:
    """Too long to run here: what its call of emit is given."""
    if find_spec("lora_fx.cli.demo") is None:
        pytest.skip("demo is not written yet")
    tree = ast.parse((ROOT / "cli" / "demo.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    given = next(c.keywords for c in calls if isinstance(c.func, ast.Name) and c.func.id == "emit")
    names = {str(k.arg) for k in given} - documented("Every command") - {"refused"}
    assert names == documented("demo")


def test_the_json_of_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(SystemExit) as stop,
    ):
        main(["export", "none", "-o", "m.onnx", "--json"])
    assert stop.value.code == 2
    assert set(json.loads(out.getvalue())) == documented("Every command") | documented("A refusal")
