"""The readers of samples/probe are formatted by each language's default formatter."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.probe.readers import HERE, SAMPLES

PROGRAMS = (str(SAMPLES.parent / "node_modules" / ".bin"), str(Path(sys.executable).parent))
"""Where formatters lie beside those of the system: npm's of the samples, and pip's."""
FORMATTERS = {
    ".mjs": ("prettier", "--no-config", "--check"),
    ".cpp": ("clang-format", "--style=LLVM", "--dry-run", "-Werror"),
    ".hpp": ("clang-format", "--style=LLVM", "--dry-run", "-Werror"),
}
"""What checks a file, by its suffix; ruff checks all of Python."""
SOURCES = [
    path for folder in (SAMPLES, HERE) for path in folder.iterdir() if path.suffix in FORMATTERS
]


def test_all_sources_are_checked() -> None:
    assert {path.suffix for path in SAMPLES.iterdir() if path.is_file()} == {".py", *FORMATTERS}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_default_formatter_changes_nothing(path: Path) -> None:
    name, *options = FORMATTERS[path.suffix]
    found = [shutil.which(name), *(shutil.which(name, path=folder) for folder in PROGRAMS)]
    program = next((program for program in found if program), None)
    if program is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [program, *options, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
