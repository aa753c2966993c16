"""The house in numbers: `python -m tests.house [ROOT]` prints them, tests/test_house.py holds them.

ROOT is another checkout; the two-weight insert is run with the package that it holds.
"""

from __future__ import annotations

import ast
import io
import os
import statistics
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
FOLDERS = ("lora_fx", "passes", "cli")


@dataclass(frozen=True)
class Module:
    """One source file of the product under its installed name."""

    path: Path
    name: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def docstrings(self) -> set[int]:
        """Line numbers of docstrings, those of attributes included."""
        found: set[int] = set()
        for node in ast.walk(self.tree):
            for child in ast.iter_child_nodes(node):
                if (
                    isinstance(child, ast.Expr)
                    and isinstance(child.value, ast.Constant)
                    and isinstance(child.value.value, str)
                ):
                    found |= set(range(child.lineno, (child.end_lineno or 0) + 1))
        return found

    @cached_property
    def comments(self) -> set[int]:
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return {t.start[0] for t in tokens if t.type == tokenize.COMMENT}

    @property
    def code(self) -> int:
        """Lines without blanks, comments and docstrings."""
        return sum(
            1
            for i, line in enumerate(self.text.splitlines(), 1)
            if line.strip() and not line.lstrip().startswith("#") and i not in self.docstrings
        )

    @cached_property
    def any_count(self) -> int:
        return sum(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(self.tree))

    @cached_property
    def classes(self) -> list[str]:
        """Public classes of the module's top level."""
        return [
            n.name
            for n in self.tree.body
            if isinstance(n, ast.ClassDef) and not n.name.startswith("_")
        ]

    def imports(self, known: Mapping[str, Module]) -> set[str]:
        """Modules of the product that it imports anywhere: lazily and for types too."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {a.name for a in node.names if a.name in known}
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add(full if full in known else node.module)
        return found - {self.name}


@dataclass(frozen=True)
class House:
    """Every module of a checkout, and who imports whom."""

    root: Path = HERE

    @cached_property
    def modules(self) -> dict[str, Module]:
        return {m.name: m for m in self._modules()}

    def _modules(self) -> Iterator[Module]:
        for folder in FOLDERS:
            for path in sorted((self.root / folder).rglob("*.py")):
                parts = path.relative_to(self.root).with_suffix("").parts
                if parts[:2] in (("lora_fx", "passes"), ("lora_fx", "cli")):
                    continue  # the links
                name = parts if parts[0] == "lora_fx" else ("lora_fx", *parts)
                yield Module(path, ".".join(name).removesuffix(".__init__"))

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The face is left out: it names the verbs, lazily."""
        return {
            n: m.imports(self.modules) - {"lora_fx"}
            for n, m in self.modules.items()
            if n != "lora_fx"
        }

    def circles(self) -> list[list[str]]:
        """Groups of modules that import each other, by Tarjan's algorithm."""
        index: dict[str, int] = {}
        low: dict[str, int] = {}
        stack: list[str] = []
        found: list[list[str]] = []

        def visit(name: str) -> None:
            index[name] = low[name] = len(index)
            stack.append(name)
            for other in sorted(self.imports.get(name, ())):
                if other not in index:
                    visit(other)
                    low[name] = min(low[name], low[other])
                elif other in stack:
                    low[name] = min(low[name], index[other])
            if low[name] == index[name]:
                at = stack.index(name)
                group = stack[at:]
                del stack[at:]
                if len(group) > 1:
                    found.append(sorted(group))

        for name in sorted(self.imports):
            if name not in index:
                visit(name)
        return found

    def fragments(self, longest: int = 150) -> list[tuple[str, str]]:
        """(module, its one importer) in one folder, where the module is shorter than `longest`."""
        importers: defaultdict[str, set[str]] = defaultdict(set)
        for name, others in self.imports.items():
            for other in others:
                importers[other].add(name)
        return sorted(
            (name, next(iter(importers[name])))
            for name, m in self.modules.items()
            if not m.is_package
            and len(importers[name]) == 1
            and m.lines < longest
            and self.modules[next(iter(importers[name]))].folder == m.folder
        )

    def repeated(self) -> dict[str, list[str]]:
        """Public class name → the modules that define one of that name, where they are several."""
        where: defaultdict[str, list[str]] = defaultdict(list)
        for name, m in self.modules.items():
            for c in m.classes:
                where[c].append(name)
        return {c: ms for c, ms in sorted(where.items()) if len(ms) > 1}

    def numbers(self) -> dict[str, str]:
        """What the script prints, in order."""
        files = list(self.modules.values())
        lines = sum(m.lines for m in files)
        largest = max(files, key=lambda m: m.lines)
        circles = self.circles()
        return {
            "modules": f"{len(files)}",
            "lines": f"{lines}",
            "code lines": f"{sum(m.code for m in files)}",
            "median file": f"{statistics.median(m.lines for m in files):.0f} lines",
            "largest file": f"{largest.lines} lines, {largest.name}",
            "folders": f"{len({m.folder for m in files})}",
            "circles": f"{len(circles)}, of {sorted(map(len, circles), reverse=True)} modules",
            "one-importer fragments": f"{len(self.fragments())}",
            "repeated public class names": f"{len(self.repeated())}",
            "Any in 1,000 lines": f"{1000 * sum(m.any_count for m in files) / lines:.1f}",
            "comments in 1,000 lines": f"{1000 * sum(len(m.comments) for m in files) / lines:.1f}",
        }


TWO_WEIGHTS = """
import json, sys, pathlib, collections
import torch
import lora_fx

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(16, 24), torch.nn.Linear(24, 12)
    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

import lora_fx.passes.find
SEARCH = "_search" if hasattr(lora_fx.passes.find, "_search") else "find"
root = pathlib.Path(lora_fx.__file__).parent.parent.resolve()
torch.manual_seed(0)
x = torch.randn(3, 16)
lora_fx.insert(Net(), (x,))  # imports are no part of it
counts, files = collections.Counter(), set()
names = {}
def where(code):
    if code not in names:
        p = pathlib.Path(code.co_filename).resolve()
        inside = p.is_relative_to(root) and p.relative_to(root).parts[0] in FOLDERS
        names[code] = p if inside else None
    return names[code]
def hook(frame, event, arg):
    if event != "call":
        return
    callee = where(frame.f_code)
    if callee is None:
        return
    files.add(callee)
    caller = where(frame.f_back.f_code) if frame.f_back is not None else None
    if caller is not None and caller != callee:
        counts["crossings"] += 1
    if callee.parts[-2:] == ("passes", "find.py") and frame.f_code.co_name == SEARCH:
        counts["find"] += 1
    if frame.f_code.co_name == "weight_flow":
        counts["walks"] += 1
sys.setprofile(hook)
lora_fx.insert(Net(), (x,))
sys.setprofile(None)
print(json.dumps({**counts, "modules entered": len(files)}))
"""
"""An insert into a net of two weights, watched by sys.setprofile: what it enters and repeats."""


def two_weight_insert(root: Path = HERE) -> dict[str, int]:
    """Counts of one insert: crossings between product files, finds, walks of the whole graph."""
    import json

    code = f"FOLDERS = {FOLDERS!r}\n{TWO_WEIGHTS}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    counts: dict[str, int] = Counter(json.loads(done.stdout.splitlines()[-1]))
    return counts


def main() -> None:
    """Print every number of a checkout."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE
    house = House(root)
    for what, number in house.numbers().items():
        print(f"{what:30}{number}")
    for what, count in two_weight_insert(root).items():
        print(f"{'two-weight insert: ' + what:38}{count}")
    for group in house.circles():
        print("circle:", " ".join(group))
    for name, importer in house.fragments():
        print(f"fragment: {name} ({house.modules[name].lines} lines) of {importer}")
    for name, modules in house.repeated().items():
        print(f"repeated: {name} in {', '.join(modules)}")


if __name__ == "__main__":
    main()
