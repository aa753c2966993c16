"""The modules of lora-fx that the distribution lora-fx-light has.

They are the modules that its commands and its public names reach by imports, those inside functions
included, and that its libraries are enough to import. So nobody keeps a list: a new module is in
the distribution as soon as a command imports it, unless it needs torch or onnx.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = {
    "numpy": "numpy",
    "ml_dtypes": "ml_dtypes",
    "click": "click",
    "regex": "regex",
    "filelock": "filelock",
    "jinja2": "jinja2",
    "markupsafe": "jinja2",
    "threadpoolctl": "threadpoolctl",
}
"""An imported name → the dependency that installs it."""
ENTRANCES = (
    "lora_fx.cli.run",
    "lora_fx.cli.__main__",
    "lora_fx.adapter.base",
    "lora_fx.formats.base",
)
"""Modules that are run, or that packages with formats and variants of their own import."""


@dataclass(frozen=True)
class Imports:
    """The absolute imports of a module as dotted names; those for type checkers are left out.

    Attributes:
        at_once: The imports that run when the module is imported.
        later: The imports inside its functions.
    """

    at_once: frozenset[str]
    later: frozenset[str]


def parts(root: Path, commands: tuple[str, ...]) -> dict[str, Path]:
    """Return dotted name → file of the modules that the distribution has.

    Args:
        root: The folder of the package lora_fx.
        commands: The commands of the distribution.
    """
    files = dict(modules_below(root))
    imports = {name: imports_of(path) for name, path in files.items()}
    importable = _importable(imports)
    starts = [*ENTRANCES, *(f"lora_fx.cli.{command}" for command in commands)]
    starts += [name for name in _public_modules(files["lora_fx"]) if name in importable]

    reached = set[str]()
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name in importable and name not in reached:
            reached.add(name)
            waiting += _parents(name)
            waiting += _modules_among(imports[name].at_once | imports[name].later, files)
    return {name: files[name] for name in sorted(reached)}


def modules_below(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, file) of each module below the folder of a package.

    The folders cli and passes are links to other places, which `Path.rglob` does not follow.
    """
    for folder in (root, root / "cli", root / "passes"):
        for path in sorted(folder.rglob("*.py")):
            parts_of_name = ("lora_fx", *path.relative_to(root).with_suffix("").parts)
            yield ".".join(parts_of_name).removesuffix(".__init__"), path


def imports_of(path: Path) -> Imports:
    """Return the imports of a file."""
    at_once = set[str]()
    later = set[str]()
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text("utf-8")), False)]
    while waiting:
        node, in_function = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        (later if in_function else at_once).update(_imported_by(node))
        in_function = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        waiting += [(child, in_function) for child in ast.iter_child_nodes(node)]
    return Imports(frozenset(at_once), frozenset(later))


def _imported_by(node: ast.AST) -> list[str]:
    """Return the dotted names that an import statement imports; none for another node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _importable(imports: dict[str, Imports]) -> set[str]:
    """Return the modules that can be imported with the libraries of the distribution."""
    known = {"lora_fx", *LIBRARIES, *sys.stdlib_module_names}
    importable = {
        name
        for name, of_module in imports.items()
        if known.issuperset(imported.partition(".")[0] for imported in of_module.at_once)
    }
    while True:
        failing = {
            name
            for name in importable
            if not importable.issuperset(_parents(name))
            or not importable.issuperset(_modules_among(imports[name].at_once, imports))
        }
        if not failing:
            return importable
        importable -= failing


def _modules_among(imported: Iterable[str], modules: Collection[str]) -> list[str]:
    """Return the modules of lora-fx that dotted names of imports mean.

    The name `lora_fx.text.near` is one of the module lora_fx.text, and `lora_fx.cli.run` a module.
    """
    meant = [name if name in modules else name.rpartition(".")[0] for name in imported]
    return [name for name in meant if name in modules]


def _parents(name: str) -> list[str]:
    """Return the packages that a module is in, which are imported before it."""
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in range(1, len(pieces))]


def _public_modules(face: Path) -> list[str]:
    """Return the modules that lora_fx/__init__.py imports its public names from."""
    for node in ast.parse(face.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_NAMES":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{face}: no table _NAMES of public names")
