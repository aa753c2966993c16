"""What maintainers rely on: the version, the formats of files, the steps of CI."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from lora_fx.fx.pt2.file_manifest import FORMAT, SWITCH_FORMAT
from lora_fx.onnx.manifest import WHOLE_FORMAT
from lora_fx.probe import probe
from tests.release import ROOT, differences

STABILITY = (ROOT / "docs" / "stability.md").read_text("utf-8")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_version_is_the_same_everywhere() -> None:
    assert not [*differences(ROOT)]


def test_another_version_is_seen(copy: Path) -> None:
    citation = copy / "CITATION.cff"
    citation.write_text(citation.read_text().replace("version: 0", "version: 9"))
    assert [line for line in differences(copy) if line.startswith("CITATION.cff")]


def test_a_release_needs_its_changelog(copy: Path) -> None:
    (unreleased,) = differences(copy, "0.1.0")
    assert "begins with '## [Unreleased]'" in unreleased
    log = copy / "CHANGELOG.md"
    log.write_text(log.read_text().replace("## [Unreleased]", "## [0.1.0] - 2026-12-24", 1))
    assert not [*differences(copy, "0.1.0")]
    assert len([*differences(copy, "0.2.0")]) == 2


@pytest.mark.parametrize(
    ("file", "highest"),
    [("`.onnx`", WHOLE_FORMAT), ("`.pt2`", max(FORMAT, SWITCH_FORMAT)), ("[probe]", probe.FORMAT)],
)
def test_the_page_on_stability_has_the_numbers_of_formats(file: str, highest: int) -> None:
    (row,) = [line for line in STABILITY.splitlines() if line.startswith("|") and file in line]
    numbers = [int(number) for number in re.findall(r"\d+", row.split("|")[2])]
    assert numbers[-1] == highest


def test_every_step_of_ci_is_a_script_of_the_repository() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    steps = re.findall(r"- run: (.+)", workflow)
    assert ".ci/run" in steps
    for step in steps:
        module = re.fullmatch(r"python -m ([\w.]+)", step)
        path = ROOT / (f"{module[1].replace('.', '/')}.py" if module else step)
        assert path.is_file(), step


def test_paths_that_the_guides_name_exist() -> None:
    """Those in the tables and commands of AGENTS.md and of the page on the architecture."""
    for page in ("AGENTS.md", "docs/architecture.md"):
        text = (ROOT / page).read_text("utf-8")
        for path in re.findall(r"(?:tests|docs|lora_fx|passes|cli)/[\w/]+(?:\.\w+)?", text):
            if "NAME" not in path:
                assert (ROOT / path).exists(), f"{page}: {path}"
