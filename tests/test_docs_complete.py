"""Every command, verb and option has its place in the documentation; links lead somewhere."""

from __future__ import annotations

import ast
import re
from importlib import import_module

import click
import pytest

from lora_fx.cli.common import COMMANDS
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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_on_its_page(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text()
    made: click.Command = import_module(f"lora_fx.cli.{name.replace('-', '_')}").command
    for p in made.params:
        if isinstance(p, click.Option):
            long = max(p.opts, key=len)
            assert f"`{long}`" in page, f"docs/{name}.md: {long}"


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_python_blocks_are_short_lines() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.text)
                assert all(len(line) <= 100 for line in block.text.splitlines()), block
