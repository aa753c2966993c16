"""The stand-in for the CUDA runtime: nobody computes on it, and no test of this process sees it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_fx.onnx.cuda_device import PLACEMENT_ONLY, device_name, driver_present
from tests.cuda import stand_in
from tests.cuda.cases import Case
from tests.cuda.table import PLACED, measured

ROOT = Path(__file__).parents[2]
OPENED = Path(__file__).with_name("opened.py")
REFUSED = f"the CUDA device is named '{PLACEMENT_ONLY}': it is a stand-in that computes nothing"


def test_no_session_opens_on_the_stand_in(stand_in_folder: Path, files: Path) -> None:
    path = Case("tied_head", "switch").export(files)
    child = stand_in.run_with(stand_in_folder, OPENED, path)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == {
        "driver": "True",
        "open_session auto": REFUSED,
        "Session auto": REFUSED,
        "open_session cuda": REFUSED,
        "Session cuda": REFUSED,
        "open_session cpu": "opened",
        "Session cpu": "opened",
    }


def test_no_command_computes_on_the_stand_in(stand_in_folder: Path, files: Path) -> None:
    path = Case("tied_head", "merged").export(files)
    child = stand_in.run_with(stand_in_folder, "-m", "lora_fx.cli", "verify", path, path)
    assert child.returncode == 2
    assert REFUSED in child.stderr and "--provider cpu" in child.stderr


def test_this_process_does_not_see_the_stand_in(stand_in_folder: Path, files: Path) -> None:
    had_driver = driver_present()
    measured(Case("tied_head", "merged"), stand_in_folder, files)
    assert str(stand_in_folder) not in os.environ.get("LD_LIBRARY_PATH", "")
    assert driver_present() == had_driver
    assert device_name() != PLACEMENT_ONLY


def test_a_file_that_is_none_is_refused(stand_in_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"junk")
    child = stand_in.run_with(stand_in_folder, PLACED, path)
    assert "refused" in json.loads(child.stdout), child.stderr


@pytest.mark.parametrize("missing", stand_in.TOOLS)
def test_without_a_compiler_nothing_is_built(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "provider_library", lambda: tmp_path / "provider.so")
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == missing else tool)
    with pytest.raises(stand_in.CannotBuild, match=f"{missing} is not installed"):
        stand_in.build(tmp_path)


def test_the_command_fails_without_a_compiler(tmp_path: Path) -> None:
    """The default run skips its rows instead."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda", "--only", "tied_head"],
        env={**os.environ, "PATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "the stand-in for the CUDA runtime cannot be built" in done.stderr
