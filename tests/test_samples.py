"""Every sample runs, with warnings as errors, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
PRINTS = {
    "mlp": "export: ok",
    "raw_matmul": "folded and unfolded differ by",
    "decode": "tokens equal transformers': True\ntokens equal the base model's: False",
    "accelerate_loop": "resumed in the middle, the same adapter: True",
    "fabric_loop": "resumed in the middle, the same adapter: True",
    "hf_trainer": "resumed in the middle, the same adapter: True",
    "from_scratch": "2 sites found, inserted and folded",
}
SLOW = {"minilm_stdlib": "equal"}
SHARED = ("beside_peft", "sources")
"""What samples import of each other; no program."""


def test_every_sample_is_listed_and_short() -> None:
    files = {p.stem: p for p in SAMPLES.glob("*.py")}
    assert set(files) == {*PRINTS, *SLOW, *SHARED}
    assert all(len(p.read_text().splitlines()) < 120 for p in files.values())


@pytest.mark.parametrize("name", PRINTS)
def test_sample(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert PRINTS[name] in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_sample_on_real_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SAMPLES / "minilm_stdlib.py"), "--quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "predict equal classes for 150 of 150" in done.stdout
