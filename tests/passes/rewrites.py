"""The graphs of docs/rewrites.md: golden files of the passes, in a shorter form.

A line `<!-- rewrite: NAME -->` of the page stands for tests/fixtures/passes/NAME.txt; what follows
it, up to `<!-- end of rewrite -->`, is its graph before and after the pass. A tensor stands where
it is read, under its own name, and an operator without its overload.

`python -m tests.passes.rewrites` writes the graphs into the page.
"""

from __future__ import annotations

import re

from tests.passes.golden import File
from tests.test_docs import DOCS

PAGE = DOCS / "rewrites.md"
SHOWN = re.compile(r"(<!-- rewrite: (\w+) -->\n).*?(<!-- end of rewrite -->)", re.S)
TENSOR = re.compile(r'^    (\w+) = tensor\("([\w.]+)"\)\n', re.M)
OVERLOAD = re.compile(r"\b(aten\.\w+)\.\w+\(")
SAME_NODES = "The nodes are the same after it; the numbers in the weights are others."


def short(code: str) -> str:
    """A function of a golden file as lines, without what a reader of graphs does not miss."""
    stored = dict(TENSOR.findall(f"{code}\n"))
    body = TENSOR.sub("", f"{code}\n").partition("\n")[2]
    lines = [line.removeprefix("    ") for line in body.splitlines()]
    text = OVERLOAD.sub(r"\1(", "\n".join(lines))
    text = re.sub(r"\breturn \((.*?),\)$", r"return \1", text)
    return re.sub(r"\w+", lambda name: stored.get(name[0], name[0]), text)


def shown(name: str) -> str:
    """What the page shows of a golden file."""
    file = File.read(name)
    before, after = (short(file.parts[part].code) for part in ("before", "after"))
    first = f"```text\n{before}\n```\n\n"
    if before == after:
        return f"{first}{SAME_NODES}\n\n"
    return f"{first}becomes\n\n```text\n{after}\n```\n\n"


def page() -> str:
    """The page, with the graphs of the golden files as they are now."""
    return SHOWN.sub(lambda part: f"{part[1]}\n{shown(part[2])}{part[3]}", PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
