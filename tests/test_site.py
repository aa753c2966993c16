"""The site of the documentation: every page has its place, and all links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import lora_fx
from tests.test_docs import DOCS, ROOT


def hook() -> Any:
    """docs/site.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("docs_site", DOCS / "site.py")
    assert spec and spec.loader
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    return site


SITE = hook()
BOOK: dict[str, Any] = json.loads((ROOT / SITE.NOTEBOOK).read_text())


def test_every_page_has_its_place() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    there = re.findall(r"^ +- (?:[^:\n]+: )?([\w-]+\.md)$", text, re.M)
    assert len(there) == len(set(there))
    outside = {
        "overview.md", "quickstart.md", "api.md", "contributing.md", "agents.md", "passes.md",
        "security.md", "changelog.md",
    }  # fmt: skip
    assert set(there) == {p.name for p in DOCS.glob("*.md")} | outside


@pytest.mark.parametrize(
    ("text", "source", "wanted"),
    [
        ("[docs/fold.md](docs/fold.md#a)", "README.md", "[fold](fold.md#a)"),
        ("[x](passes/README.md)", "README.md", "[x](passes.md)"),
        ("[x](../SECURITY.md)", "docs/merge.md", "[x](security.md)"),
        ("[x](../samples/mlp.py)", "docs/merge.md", "[x](samples/mlp.md)"),
        ("[x](fold.md) [y](https://a.b/c.md) [z](#d)", "docs/merge.md", None),
        ("```text graph before\n", "README.md", '```text title="before"\n'),
    ],
)
def test_links_are_turned(text: str, source: str, wanted: str | None) -> None:
    places = SITE.PAGES | {"samples/mlp.py": "samples/mlp.md"}
    assert SITE.turned(text, source, places) == (wanted or text)


class Sources(HTMLParser):
    """What a page loads by itself, and its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a script, a style, a picture, and what has a name."""
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        rel = found.get("rel") or ""
        if tag in ("script", "img", "iframe") or (tag == "link" and rel != "canonical"):
            self.loaded.append(found.get("src") or found.get("href") or "")


def test_the_notebook_was_run_and_is_a_page() -> None:
    """In order, without an error, and with what a reader wants to see."""
    counts = [c["execution_count"] for c in BOOK["cells"] if c["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [o for c in BOOK["cells"] for o in c.get("outputs", ())]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    page = SITE.notebook(BOOK)
    assert page.count("![result](data:image/png;base64,iVBOR") == 2
    assert "<table><tr><th>key</th>" in page and "```text\nexport: ok" in page
    assert page.count("```python") == len(counts) and page.count("```") % 2 == 0


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its last cell holds what it promises; every cell says as much as the stored one."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.reads(json.dumps(BOOK), 4)
    nbclient.NotebookClient(book, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell, stored in zip(book.cells, BOOK["cells"], strict=True):
        kinds = [o["output_type"] for o in cell.get("outputs", ())]
        assert kinds == [o["output_type"] for o in stored.get("outputs", ())]
    assert (tmp_path / "digits.onnx").is_file()


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly; no page asks another machine for anything, and every public name is explained."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    made = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(made, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {p: Sources(p.read_text()) for p in tmp_path.rglob("*.html")}
    assert len(pages) > 40
    for path, page in pages.items():
        assert not [s for s in page.loaded if re.match(r"(https?:)?//", s)], path
    (api,) = (page for path, page in pages.items() if path.parent.name == "api")
    public = {f"lora_fx.{n}" for n in lora_fx.__all__ if not n.startswith("_")}
    explained = {re.sub(r"^lora_fx\.(?:\w+\.)*", "lora_fx.", i) for i in api.ids}
    assert public <= explained, public - explained
