"""The distribution lora-fx-light: what is in it, and what it does without torch and onnx.

`python -m tests.light` builds it, installs it on a bare Python and runs the tests that it can run.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx import Adapter, LowRank, save_adapter
from lora_fx.cli.distribution import Distribution
from tests.house import HERE as ROOT
from tests.light import COMMANDS, LIBRARIES, parts

LIGHT = ROOT / "light"
BARE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

FOUND = {*LIBRARIES, *sys.stdlib_module_names}

class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == 'lora_fx':
            path = [place for place in sys.path if place.startswith(LIGHT)]
        elif name not in NAMES and name.partition('.')[0] not in FOUND:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Bare]
sys.path.insert(0, LIGHT)
"""
"""A program that finds only what a bare environment has after the installation.

It begins with the values of NAMES, LIBRARIES and LIGHT, from in_a_bare_environment.
"""


@functools.cache
def names() -> list[str]:
    """Return the dotted names of the modules that the distribution has."""
    return list(parts(ROOT / "lora_fx", COMMANDS))


def in_a_bare_environment(code: str) -> str:
    """Run a program that begins so, outside the repository, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    values = f"""
NAMES = {names()}
LIBRARIES = {[*LIBRARIES, "lora_fx_light"]}
LIGHT = {str(LIGHT)!r}
"""
    program = [sys.executable, "-c", values + BARE + code]
    done = subprocess.run(program, capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_modules_need_its_libraries_alone() -> None:
    code = f"""
from importlib import import_module
from lora_fx_light import lora_fx
for name in {[name for name in names() if not name.endswith("__main__")]}:
    import_module(name)
assert lora_fx.__file__.startswith({str(LIGHT)!r}), lora_fx.__file__

assert callable(lora_fx.merge) and callable(lora_fx.load_adapter)
try:
    lora_fx.insert
except ImportError as error:
    print(type(error).__name__, error)
"""
    error, hint = in_a_bare_environment(code).splitlines()
    assert error.startswith("LeftOutError this needs torch or ONNX, which lora-fx-light leaves out")
    assert hint.startswith("Hint: pip install lora-fx")


def test_it_has_what_its_commands_need_and_no_other_command() -> None:
    commands = {f"lora_fx.cli.{command}" for command in COMMANDS}
    assert {"lora_fx.checkpoint.merge", "lora_fx.checkpoint.doctor", *commands} <= set(names())
    assert not [name for name in names() if name.startswith("lora_fx.fx")]
    assert not {"lora_fx.cli.train", "lora_fx.cli.export", "lora_fx.passes.fold"} & set(names())


ONNX = "Error: this needs torch or ONNX, which lora-fx-light leaves out"
RUNS: tuple[tuple[str, int, str], ...] = (
    ("merge base.safetensors adapter -o merged.safetensors", 0, "merged.safetensors"),
    ("verify merged.safetensors base.safetensors --adapter adapter", 0, ""),
    ("verify merged.safetensors merged.safetensors --report page.html", 0, "wrote page.html"),
    ("extract base.safetensors merged.safetensors -o again --rank 1", 0, "wrote again"),
    ("convert again -o again.safetensors --format kohya", 0, "wrote again.safetensors"),
    ("doctor base.safetensors again", 0, ""),
    ("merge base.safetensors", 2, "Hint: lora-fx-light merge --help"),
    ("merge --help", 0, "\n  lora-fx-light merge ./llama ./adapter -o ./merged\n"),
    ("--help", 0, "For other models and commands: pip install lora-fx."),
    ("--version", 0, "lora-fx-light "),
    ("train m.py:build data.npz", 2, "Hint: pip install lora-fx, and run lora-fx train"),
    ("gather base", 2, "Hint: run lora-fx-light --help to list them"),
    ("merge x.onnx adapter -o z.onnx", 2, ONNX),
    ("verify x.onnx y.onnx", 2, ONNX),
    ("convert adapter -o x.onnx_adapter", 2, ONNX),
)
"""Words of a command line in a folder with base.safetensors and an adapter → exit code, text."""


def test_commands_work_and_say_what_to_install_for_more(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w.weight": np.ones((6, 4), "f4")}, tmp_path / "base.safetensors")
    update = LowRank(np.ones((2, 4), "f4"), np.ones((6, 2), "f4"), 2.0)
    save_adapter(Adapter({"w.weight": update}), tmp_path / "adapter")
    for name in ("x.onnx", "y.onnx"):
        (tmp_path / name).touch()
    code = f"""
import contextlib, io, json, os, lora_fx_light
os.chdir({str(tmp_path)!r})
results = []
for words in {[words.split() for words, *_ in RUNS]}:
    sys.argv = ['lora-fx-light', *words]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            lora_fx_light.main()
        except SystemExit as end:
            results.append((end.code or 0, shown.getvalue()))
print(json.dumps(results))
"""
    results = json.loads(in_a_bare_environment(code))
    for (words, exit_code, text), (code_of_run, shown) in zip(RUNS, results, strict=True):
        assert code_of_run == exit_code and text in shown, f"{words}\n{shown}"
        if exit_code:
            error, hint = shown.splitlines()
            assert error.startswith("Error: ") and hint.startswith("Hint: "), shown


def test_no_path_in_a_result_gets_its_name() -> None:
    light = Distribution("lora-fx-light", COMMANDS, "", "")
    shown = light.spelled_messages(
        {
            "outputs": ["lora-fx merge", "/x/lora-fx[v1]/out"],
            "error": "/x/lora-fx merge/out: no adapter",
            "checks": [{"hint": "run lora-fx merge BASE ADAPTER"}],
        }
    )
    assert shown == {
        "outputs": ["lora-fx merge", "/x/lora-fx[v1]/out"],
        "error": "/x/lora-fx merge/out: no adapter",
        "checks": [{"hint": "run lora-fx-light merge BASE ADAPTER"}],
    }


def projects() -> tuple[dict[str, Any], dict[str, Any]]:
    """The pyproject.toml of each distribution, lora-fx first."""
    whole, part = (
        tomllib.loads((folder / "pyproject.toml").read_text("utf-8")) for folder in (ROOT, LIGHT)
    )
    return whole, part


def test_no_file_is_in_both() -> None:
    whole, part = projects()
    packages = whole["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in packages} == {"lora_fx"}
    assert not whole["project"]["scripts"].keys() & part["project"]["scripts"].keys()
    assert (LIGHT / "lora_fx_light" / "modules" / "lora_fx").samefile(ROOT / "lora_fx")


def test_its_version_and_dependencies_are_those_of_lora_fx() -> None:
    whole, part = (project["project"] for project in projects())
    assert part["version"] == whole["version"]
    assert part["requires-python"] == whole["requires-python"]
    lines = {line.partition(";")[0].partition("#")[0].strip() for line in whole["dependencies"]}
    assert set(part["dependencies"]) <= lines
    names = {line.partition(">")[0] for line in part["dependencies"]}
    assert names == set(LIBRARIES.values())
