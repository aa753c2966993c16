"""Environments of other runtimes: one for each file in requirements/, with pinned versions.

The environment of requirements/NAME.txt is the folder `.venv-runtimes/NAME` of this checkout, or
`$LORA_FX_RUNTIMES/NAME`. Nothing of the environment of the tests is seen in it, so that a sample
runs with what its page says and with nothing else. `python -m tests.runtimes` makes them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.webgpu import python_of

ROOT = Path(__file__).parent.parent.parent
REQUIREMENTS = Path(__file__).parent / "requirements"
INSTALLED = "installed.txt"
"""The file in an environment that repeats its requirements, written after they are installed."""


def names() -> list[str]:
    """The names of all environments."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def folder_of(name: str) -> Path:
    """The folder of an environment, which may not exist."""
    parent = os.environ.get("LORA_FX_RUNTIMES") or ROOT / ".venv-runtimes"
    return Path(parent).resolve() / name


def requirements_of(name: str) -> str:
    """The pinned requirements of an environment, one a line."""
    return (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")


def is_made(name: str) -> bool:
    """Whether an environment has what its requirements say today."""
    installed = folder_of(name) / INSTALLED
    return installed.exists() and installed.read_text(encoding="utf-8") == requirements_of(name)


def make(name: str) -> Path:
    """Make an environment, if it is not there as required, and return its interpreter.

    Raises:
        CalledProcessError: Its packages cannot be installed.
    """
    folder = folder_of(name)
    python = python_of(folder)
    if is_made(name):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    requirements = REQUIREMENTS / f"{name}.txt"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "-r", str(requirements)], check=True)
    (folder / INSTALLED).write_text(requirements_of(name), encoding="utf-8")
    return python


def environment(name: str) -> Path:
    """The interpreter of an environment; the test that calls is skipped where it was not made."""
    if not is_made(name):
        pytest.skip(f"python -m tests.runtimes {name}")
    return python_of(folder_of(name))


def run_in(name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """Run Python in an environment and return what it prints; its errors are shown as they are.

    Args:
        name: The environment; the test that calls is skipped where it was not made.
        arguments: The program and its arguments.
        cwd: The working folder.
    """
    # -I: neither the folder of the program nor PYTHONPATH, which would show it this checkout
    command = [str(environment(name)), "-I", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        pytest.fail(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout
