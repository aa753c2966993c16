"""AOTInductor: one compilation, base and two adapters, equal to torch; the rows of the table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lora_fx
from tests.runtimes import models
from tests.runtimes.consumers import agree
from tests.runtimes.environments import environment
from tests.runtimes.programs import LARGEST, Runtime, exported

pytestmark = pytest.mark.slow
RUNTIME = Runtime("AOTInductor, CPU", "aotinductor", "torch", ".aoti.pt2")


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets a line for every call of the C++ compiler; nothing compiled is reused."""
    environment(RUNTIME.environment)  # a skip where it was not made
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.fail("AOTInductor needs g++")
    calls = tmp_path / "calls.txt"
    calls.touch()
    counting = tmp_path / "counting-g++"
    counting.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\nexec "{compiler}" "$@"\n')
    counting.chmod(0o755)
    monkeypatch.setenv("CXX", str(counting))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return calls


@pytest.mark.parametrize("name", models.SUBJECTS)
def test_the_row(
    name: str, compilations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = exported(name, tmp_path, RUNTIME, lora_fx.Switch(largest=LARGEST[name]))
    program.run_sample()
    calls = compilations.read_text().splitlines()
    assert sum(".cpp" in call for call in calls) > 0

    # every size and adapter, where no compiler is to be had
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    result = program.measured()
    all_equal = max(result["errors"].values()) <= models.GATE
    agree(program.row(result, "0 compilations", dynamic_sizes=all_equal))


@pytest.mark.usefixtures("compilations")
def test_adapters_padded_to_one_rank(tmp_path: Path) -> None:
    mode = lora_fx.Switch(rank=max(models.RANKS.values()))
    exported("text", tmp_path, RUNTIME, mode).run_sample()
