"""What the site of the documentation holds beside docs/: README, samples, the API.

A hook of MkDocs. Pages that lie elsewhere in the repository keep their text; their links are turned
to where the pages stand in the site.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "passes/README.md": "passes.md",
}
"""Pages by where they lie in the repository → in the site."""
NOTEBOOK = "samples/quickstart.ipynb"
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    from mkdocs.structure.files import File

    samples = {f"samples/{p.name}": f"samples/{p.stem}.md" for p in ROOT.glob("samples/*.py")}
    places = PAGES | samples
    for source, place in places.items():
        text = (ROOT / source).read_text()
        if source in samples:
            text = f"# {source}\n\n```python\n{text}```\n"
        files.append(File.generated(config, place, content=turned(text, source, places)))
    files.append(File.generated(config, "api.md", content=reference()))
    shown = notebook(json.loads((ROOT / NOTEBOOK).read_text()))
    files.append(File.generated(config, "quickstart.md", content=shown))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of docs/ that leave it."""
    if page.file.generated_by:
        return markdown
    samples = {f"samples/{p.name}": f"samples/{p.stem}.md" for p in ROOT.glob("samples/*.py")}
    return turned(markdown, f"docs/{page.file.src_uri}", PAGES | samples)


def turned(text: str, source: str, places: dict[str, str]) -> str:
    """The text of a page with its links as the site has them.

    Args:
        text: What the page says.
        source: Where it lies in the repository.
        places: Where pages outside docs/ stand in the site.
    """
    place = places.get(source, posixpath.relpath(source, "docs"))

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        there = places.get(target, posixpath.relpath(target, "docs"))
        return f"]({posixpath.relpath(there, posixpath.dirname(place) or '.')}"

    text = re.sub(r"\[docs/([\w-]+)\.md\]", r"[\1]", text)  # in the repository a link says its file
    # fences of the README that its tests know by a word are titles in the site
    text = re.sub(r"^```text graph (\w+)$", r'```text title="\1"', text, flags=re.M)
    return LINK.sub(link, text)


def notebook(book: dict[str, Any]) -> str:
    """A notebook as a page: its text, its code, and what each cell gave when it was run."""
    parts = []
    for cell in book["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(
                    f"![result](data:image/png;base64,{''.join(data['image/png']).strip()})"
                )
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            else:
                said = "".join(output.get("text") or data.get("text/plain", ""))
                parts.append(f"```text\n{said.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """The page of the public API: every public name with its docstring."""
    import lora_fx

    names = [n for n in lora_fx.__all__ if not n.startswith("_")]
    verbs = [n for n in names if n[0].islower()]
    kinds = [n for n in names if n[0].isupper()]
    parts = ["# API", "What `import lora_fx` gives. Each verb's own page has examples."]
    parts += [f"::: lora_fx.{n}" for n in (*verbs, *kinds)]
    return "\n\n".join(parts) + "\n"
