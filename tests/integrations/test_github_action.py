"""The GitHub Action: its shell steps are taken out of action.yml and run, as a runner would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import lora_fx
from lora_fx.adapter.lowrank import LowRank
from tests.house import HERE as ROOT

ACTION = ROOT / ".github" / "actions" / "verify-adapter"


def action() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ACTION / "action.yml").read_text())
    return loaded


def step(name: str) -> dict[str, Any]:
    steps = action()["runs"]["steps"]
    found: dict[str, Any] = next(step for step in steps if step["name"] == name)
    return found


class Runner:
    """What a runner gives a step: a folder, the inputs, and files for outputs and the summary."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temp = folder / "runner temp"
        self.temp.mkdir()

    def run(self, name: str, **inputs: str) -> subprocess.CompletedProcess[str]:
        chosen = {key: row.get("default", "") for key, row in action()["inputs"].items()}
        chosen |= inputs
        part = step(name)
        environment = {
            key: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda m: chosen[m[1]], text)
            for key, text in part["env"].items()
        }
        environment |= {
            "RUNNER_TEMP": str(self.temp),
            "GITHUB_ACTION_PATH": str(ACTION),
            "GITHUB_OUTPUT": str(self.temp / "output"),
            "GITHUB_STEP_SUMMARY": str(self.temp / "summary"),
        }
        assert "${{" not in part["run"], "an input in the script would be run as shell"
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", part["run"]],
            cwd=self.folder, env={**os.environ, **environment}, capture_output=True, text=True,
        )  # fmt: skip

    def outputs(self) -> dict[str, str]:
        lines = (self.temp / "output").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """A repository with a base, two adapters, and one of another model; lora-fx is this tree's."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    save_file({"fc.weight": normal(6, 4)}, tmp_path / "base.safetensors")
    for name, size in (("one", 4), ("two", 4), ("other", 5)):
        update = LowRank(normal(2, size), normal(6, 2), 2.0)
        lora_fx.save_adapter(lora_fx.Adapter({"fc.weight": update}), tmp_path / name)
    made = Runner(tmp_path)
    tool = made.temp / "lora-fx" / "bin" / "lora-fx"
    tool.parent.mkdir(parents=True)
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_fx.cli "$@"\n')
    tool.chmod(0o755)
    return made


def test_adapters_that_fit(runner: Runner) -> None:
    done = runner.run("Verify", base="base.safetensors", adapter="one\ntwo\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("verify: ok") == 4
    outputs = runner.outputs()
    assert outputs["ok"] == "true"
    merged = sorted(path.name for path in Path(outputs["merged"]).iterdir())
    assert merged == ["1.safetensors", "2.safetensors"]
    summary = (runner.temp / "summary").read_text()
    assert summary.startswith("## Adapters of `base.safetensors`\n")
    assert "$ lora-fx verify base.safetensors one # exit 0\nverify: ok" in summary


def test_one_that_does_not_fit(runner: Runner) -> None:
    done = runner.run("Verify", base="base.safetensors", adapter="other\none", merge="false")
    assert done.returncode == 1
    assert "::error::an adapter does not fit base.safetensors" in done.stdout
    assert runner.outputs()["ok"] == "false"
    summary = (runner.temp / "summary").read_text()
    assert (
        "verify base.safetensors other # exit 2\nError: base.safetensors: tensor [6, 4]" in summary
    )
    assert "verify base.safetensors one # exit 0" in summary and "merge" not in summary


def test_no_adapter_and_a_name_with_shell_in_it(runner: Runner) -> None:
    assert runner.run("Verify", base="base.safetensors", adapter="\n").returncode == 1
    done = runner.run("Verify", base="base.safetensors", adapter="$(touch hacked); `touch hacked`")
    assert done.returncode == 1 and "no such file or folder" in done.stdout
    assert not (runner.folder / "hacked").exists()


def test_what_is_installed(tmp_path: Path) -> None:
    """pip gets the folder of this tree, or what the user names; pip itself is not run here."""
    made = Runner(tmp_path)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        '#!/bin/sh\nmkdir -p "$3/bin"\nprintf \'#!/bin/sh\\necho "$@"\\n\' > "$3/bin/pip"\n'
        'chmod +x "$3/bin/pip"\n'
    )
    python.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
        for base, package in (("base.onnx", ""), ("base", ""), ("base", "lora-fx==0.1.0")):
            done = made.run("Install lora-fx", base=base, package=package)
            assert done.returncode == 0, done.stderr
            what = done.stdout.removeprefix("install --quiet ").strip()
            has_light = (ROOT / "light").is_dir() and base == "base"
            if package:
                assert what == package
            else:
                assert Path(what).resolve() == (ROOT / "light" if has_light else ROOT)
