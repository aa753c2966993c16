"""Every command, verb and option has its place in the documentation; links lead somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
from importlib import import_module

import click
import pytest

from lora_fx.cli.group import COMMANDS
from tests.test_docs import DOCS, JSON, PAGES, ROOT, blocks


def test_every_command_and_verb_has_its_page() -> None:
    for name in COMMANDS:
        assert (DOCS / f"{name}.md").is_file(), name
        assert re.search(rf"^## `?{name}`?$", JSON, re.M), f"docs/json.md: {name}"
    for name in ("capture", "fold", "selectors", "adapters", "json", "numbers"):
        assert (DOCS / f"{name}.md").is_file(), name
    readme = (ROOT / "README.md").read_text()
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in readme, f"README does not link {page.name}"


COMMON = ("--config", "--save-config", "--force")
"""Options of every command."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_on_its_page(name: str) -> None:
    page, config = (DOCS / f"{name}.md").read_text(), (DOCS / "config.md").read_text()
    made: click.Command = import_module(f"lora_fx.cli.{name.replace('-', '_')}").command
    for p in made.params:
        if isinstance(p, click.Option) and not p.hidden:
            long = max(p.opts, key=len)
            assert f"`{long}`" in (config if long in COMMON else page), f"docs/{name}.md: {long}"


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_map_of_contributing() -> None:
    """Its folders are those of the tree, and the greps of its answers find something."""
    page = blocks(ROOT / "CONTRIBUTING.md")
    (drawn,) = (b for b in page if b.language == "text")
    shown = {line.split()[0].rstrip("/") for line in drawn.text.splitlines()}
    there = {
        str(p.relative_to(ROOT))
        for top in (ROOT / "lora_fx", ROOT / "passes", ROOT)
        for p in top.iterdir()
        if (p / "__init__.py").is_file() and not p.is_symlink()
    }
    assert there <= shown, there - shown
    assert all((ROOT / folder).is_dir() for folder in shown)
    greps = [b.text for b in page if b.text.startswith("grep ")]
    assert len(greps) == 3
    for line in greps:
        found = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0 and found.stdout, line


def test_python_blocks_are_short_lines() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.text)
                assert all(len(line) <= 100 for line in block.text.splitlines()), block
