"""List the tests whose assertions differ from those of an older checkout.

    python -m tests.assertions OLD_CHECKOUT

A rewrite that keeps the behaviour changes no assertion. The script compares, in their order, the
`assert` statements of each test function and its calls of pytest's `raises`, `warns` and
`deprecated_call`. It looks for a test by its name, first in the same file and then in all files.
Imported names, with the attributes after them, count as equal, because the rewrite may rename them.
The exit code is 1 if a test is gone or one of its assertions differs.
"""

from __future__ import annotations

import argparse
import ast
from collections import defaultdict
from pathlib import Path

CALLS = ("raises", "warns", "deprecated_call")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class _WithoutImportedNames(ast.NodeTransformer):
    """Replaces every imported name, with the attributes after it, by the same word."""

    def __init__(self, imported: set[str]) -> None:
        self.imported = imported

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in self.imported:
            return ast.Name(id="imported", ctx=ast.Load())
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.imported:
            return ast.Name(id="imported", ctx=ast.Load())
        return node


def imported_names(tree: ast.AST) -> set[str]:
    """The names that the imports of a file define, at its top and inside functions."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                names.add(alias.asname or alias.name.split(".")[0])
    return names


def assertions(function: ast.AST, imported: set[str]) -> list[str]:
    """The assertions of a test function as text, in the order of their lines."""
    found_nodes: list[ast.stmt | ast.expr] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            found_nodes.append(node)
        elif isinstance(node, ast.Call):
            callee = node.func
            name = callee.attr if isinstance(callee, ast.Attribute) else getattr(callee, "id", "")
            if name in CALLS:
                found_nodes.append(node)
    found_nodes.sort(key=lambda node: (node.lineno, node.col_offset))
    without_names = _WithoutImportedNames(imported)
    return [ast.unparse(without_names.visit(node)) for node in found_nodes]


def tests_of(checkout: Path) -> dict[str, dict[str, list[str]]]:
    """The assertions of every test: by the name of its function, then by its file."""
    tests: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for path in sorted(checkout.glob("tests/**/test_*.py")):
        tree = ast.parse(path.read_text())
        imported = imported_names(tree)
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS) and node.name.startswith("test_"):
                file = path.relative_to(checkout).as_posix()
                tests[node.name][file] = assertions(node, imported)
    return tests


def differences(old: Path, new: Path) -> list[str]:
    """One line for every test of `old` that `new` lacks, or whose assertions differ there."""
    lines = list[str]()
    new_tests = tests_of(new)
    for name, old_files in sorted(tests_of(old).items()):
        new_files = new_tests.get(name, {})
        for file, before in sorted(old_files.items()):
            candidates = [new_files[file]] if file in new_files else list(new_files.values())
            if before in candidates:
                continue
            if not candidates:
                lines.append(f"{file}::{name}: gone")
                continue
            after = candidates[0]
            lines.append(f"{file}::{name}: differs")
            lines += [f"    - {line}" for line in before if line not in after]
            lines += [f"    + {line}" for line in after if line not in before]
    return lines


def main() -> int:
    """Print the differences and a count; 1 if there are differences."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.assertions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, help="The older checkout.")
    old = parser.parse_args().old
    if not (old / "tests").is_dir():
        parser.error(f"{old} has no folder tests")
    new = Path(__file__).parents[1]

    lines = differences(old, new)
    print("\n".join(lines))
    count = sum(len(files) for files in tests_of(new).values())
    differing = sum(not line.startswith(" ") for line in lines)
    print(f"{count} tests, {differing} differ")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
