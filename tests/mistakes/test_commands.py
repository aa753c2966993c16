"""What people get wrong: what is said of it, and its hint, followed to the letter, leads on."""

from __future__ import annotations

import errno
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lora_fx.cli import main
from tests.faults import WRITES, Faults

ROOT = Path(__file__).parents[2]
Row = tuple[str, str, str, str]
"""A line of commands.txt, which says what its parts are."""


def rows(slow: bool) -> list[Row]:
    """The quick rows of commands.txt, or those below its last comment."""
    text = Path(__file__).with_name("commands.txt").read_text(encoding="utf-8")
    quick, _, rest = text.partition("# With a model")
    lines = [x for x in (rest if slow else quick).splitlines() if " | " in x and x[0] != "#"]
    parts = [[*line.split(" | "), ""] for line in lines]
    return [(p[0], p[1], p[2], p[3]) for p in parts]


QUICK, SLOW = rows(False), rows(True)


def followed(line: str, way: str, hint: str) -> str:
    """The command line that the hint asks for; commands.txt says what the signs mean."""
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
