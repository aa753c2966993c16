"""The rules that the tree itself has to follow."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("lora_fx", "passes", "cli")


def sources() -> Iterator[tuple[Path, str]]:
    """(path, installed module name) of every source file, each once."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in (("lora_fx", "passes"), ("lora_fx", "cli")):
                continue  # the links
            name = parts if parts[0] == "lora_fx" else ("lora_fx", *parts)
            yield path, ".".join(name).removesuffix(".__init__")


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    inner = {
        id(node)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(f)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in guarded or (top_only and id(node) in inner):
            continue
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


def layer(name: str) -> int:
    if name.startswith("lora_fx.cli"):
        return 2
    return 1 if name.startswith("lora_fx.passes") else 0


@pytest.mark.parametrize(("path", "name"), list(sources()), ids=lambda v: getattr(v, "name", v))
def test_imports_run_one_way(path: Path, name: str) -> None:
    if name == "lora_fx":
        return  # the facade only names the verbs, lazily
    for found in imports(path):
        if found.startswith("lora_fx"):
            assert layer(found) <= layer(name), f"{name} imports {found}"
        assert found.partition(".")[0] not in ("passes", "cli")


@pytest.mark.parametrize(("path", "name"), list(sources()), ids=lambda v: getattr(v, "name", v))
def test_heavy_libraries_stay_in_their_folder(path: Path, name: str) -> None:
    """torch in fx/, onnx_ir in onnx/; passes compose; the command line imports neither."""
    heavy = {i.partition(".")[0] for i in imports(path, top_only=True)}
    if not name.startswith("lora_fx.fx") and layer(name) != 1:
        assert "torch" not in heavy
    if not name.startswith("lora_fx.onnx"):
        assert not {"onnx", "onnx_ir", "onnxruntime"} & heavy
    if layer(name) == 2:
        assert not any(
            i.startswith(("lora_fx.fx", "lora_fx.onnx")) for i in imports(path, top_only=True)
        )


VERBS = (
    "checkpoint.extract.extract",
    "checkpoint.merge.merge",
    "passes.verbs.adapt.insert",
    "passes.verbs.attach.attach",
    "passes.verbs.export.export",
    "passes.verbs.plan.plan",
)
"""Public functions that users call with keywords; each makes an options object at once."""


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[str]:
    a = node.args
    plain = [x.arg for x in (*a.posonlyargs, *a.args)]
    plain = plain[1:] if plain[:1] in (["self"], ["cls"]) else plain
    return [*plain, *(x.arg for x in (a.vararg, *a.kwonlyargs, a.kwarg) if x is not None)]


@pytest.mark.parametrize(("path", "name"), list(sources()), ids=lambda v: getattr(v, "name", v))
def test_nobody_takes_more_than_eight_arguments(path: Path, name: str) -> None:
    """Nor hands on more; the fields of a record are no arguments, and aten's operators not ours."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, functions):
            own = getattr(node, "name", "lambda")
            if f"{name}.{own}".removeprefix("lora_fx.") not in VERBS:
                assert len(parameters(node)) <= 8, f"{name}:{node.lineno} {own}"
        elif isinstance(node, ast.Call):
            callee = ast.unparse(node.func)
            record = callee.rpartition(".")[2].lstrip("_")[:1].isupper()
            if not record and not callee.startswith("aten."):
                count = len(node.args) + len(node.keywords)
                assert count <= 8, f"{name}:{node.lineno} {callee}(…)"


@pytest.mark.parametrize(("path", "name"), list(sources()), ids=lambda v: getattr(v, "name", v))
def test_files_are_short_and_say_what_they_are(path: Path, name: str) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text)), "a module docstring"


def test_every_package_is_in_the_wheel() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    have = {n for p, n in sources() if p.name == "__init__.py"}
    assert set(config["packages"]) == have
    for p, n in sources():
        assert n.rpartition(".")[0] in have or n == "lora_fx", p


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_lazy_and_installs_no_bare_names() -> None:
    out = run(
        "import sys, lora_fx, lora_fx.cli, lora_fx.passes\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'transformers'}\n"
        "print(sorted((heavy | {'passes', 'cli'}) & set(sys.modules)))"
    )
    assert out.strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    out = run(
        "import sys\nfrom lora_fx.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    assert out.rstrip().endswith("[]")
    assert "targets" in out and "demo" in out


def test_public_names() -> None:
    import lora_fx

    for name in lora_fx.__all__:
        assert getattr(lora_fx, name) is not None
        assert not (ROOT / "lora_fx" / f"{name}.py").exists(), "no name equals a submodule"
    with pytest.raises(AttributeError):
        _ = lora_fx.nothing


def test_commands_are_short() -> None:
    for path in (ROOT / "cli").glob("*.py"):
        if not path.name.startswith(("_", "common")) and path.stem.replace("_", "-") in _commands():
            assert len(path.read_text().splitlines()) <= 110, path


def _commands() -> set[str]:
    from lora_fx.cli.common import COMMANDS

    return set(COMMANDS)


def test_nothing_names_this_machine() -> None:
    files = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    for f in files:
        path = ROOT / f
        if path.is_file() and not path.is_symlink() and path.suffix in (".py", ".md", ".toml", ""):
            assert "/wo" + "rk/" not in path.read_text(), f
