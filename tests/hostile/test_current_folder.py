"""Modules that lie in the current folder of a command, under the names of ours, are never run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_fx.cli.group import COMMANDS
from lora_fx.fx.load.factory import call_factory
from lora_fx.fx.load.factory_imports import importable
from lora_fx.fx.train.chat import ChatTemplate
from tests.hostile import child
from tests.hostile.mutate import make

NAMES = (
    "click", "torch", "json", "numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime",
    "safetensors", "transformers", "huggingface_hub", "timm", "torchvision", "tokenizers", "regex",
    "jinja2", "filelock", "ml_dtypes", "google", "sympy", "networkx", "yaml", "PIL", "scipy",
    "sklearn",
    "tqdm", "packaging", "typing_extensions", "threadpoolctl", "gguf", "matplotlib", "peft",
    "accelerate", "signal", "zipfile", "csv", "tomllib", "difflib", "pickle", "sqlite3", "secrets",
    "html",
    "wave",
)  # fmt: skip
"""Modules that lora-fx and its libraries import, at once or as they need them."""
LINES = {
    "targets": "targets net.py:build",
    "insert": "insert net:build -o out.pt2 -r 2",
    "train": "train net.py:build data.npz -o out -r 2 --steps 1 --validation 0",
    "merge": "merge base.safetensors peft -o out.safetensors --report out.html",
    "merge-all": "merge-all base.safetensors peft kohya.safetensors -o out -j 2",
    "export": "export net.py:build -o out.onnx",
    "extract": "extract merged.safetensors base.safetensors -o out --rank 2",
    "truncate": "truncate peft -o out --rank 1",
    "plan": "plan net:build data.csv -o out.json --method eva",
    "convert": "convert peft -o out.safetensors --format kohya",
    "verify": "verify base.safetensors base.safetensors --adapter peft",
    "probe": "probe peft --base net.py:build -o out.json",
    "doctor": "doctor base.safetensors peft",
    "bench": "bench graph.onnx --rounds 2",
    "demo": "demo --help",
}
CODES = {"verify": 1}
"""Exit codes that are right, where 0 is not."""
START = "from lora_fx.cli import main; main()"


def lay_traps(folder: Path, *, packages: bool = False) -> Path:
    """Modules that leave their names in the file that is returned."""
    canary = folder / "canary"
    code = f"open({str(canary)!r}, 'a').write(__name__ + '\\n')\nraise SystemExit(0)\n"
    for name in NAMES:
        if packages:
            (folder / name).mkdir(exist_ok=True)  # peft is an adapter of the scene, too
            (folder / name / "__init__.py").write_text(code)
        else:
            (folder / f"{name}.py").write_text(code)
    return canary


def run(arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with arguments, in a folder."""
    plain = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], cwd=folder, env={**plain, **variables},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One valid file of every kind."""
    child.prepare()
    folder = tmp_path_factory.mktemp("current") / "valid"
    folder.mkdir()
    make(folder)
    return folder


@pytest.fixture
def scene(valid: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(valid, tmp_path / "scene", symlinks=True)


def test_the_traps_are_live(tmp_path: Path) -> None:
    canary = lay_traps(tmp_path)
    run(["-c", "import click"], tmp_path)
    assert canary.read_text() == "click\n"


def test_every_command_has_a_line() -> None:
    assert set(LINES) == set(COMMANDS)


def test_merge_all_runs_nothing_of_the_current_folder(scene: Path) -> None:
    canary = lay_traps(scene)
    got = run(["-P", "-c", START, *LINES["merge-all"].split()], scene)
    assert not canary.exists(), canary.read_text()
    assert got.returncode == 0, got.stderr
    assert sorted(p.name for p in (scene / "out").iterdir()) == [
        "kohya.safetensors", "peft.safetensors"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("packages", [False, True], ids=["files", "packages"])
@pytest.mark.parametrize("name", LINES)
def test_no_command_runs_what_lies_in_the_current_folder(
    name: str, packages: bool, scene: Path
) -> None:
    canary = lay_traps(scene, packages=packages)
    got = run(["-P", "-c", START, *LINES[name].split()], scene)
    assert not canary.exists(), canary.read_text()
    assert got.returncode == CODES.get(name, 0), got.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONPATH": "/nowhere:"},
        pytest.param({"PYTHONPATH": ":"}, marks=pytest.mark.slow),
        pytest.param({"PYTHONPATH": ""}, marks=pytest.mark.slow),
    ],
    ids=["a colon at the end", "colon", "empty"],
)
def test_an_empty_entry_of_pythonpath_is_no_place_of_imports(
    variables: dict[str, str], scene: Path
) -> None:
    canary = lay_traps(scene)
    for start in (["-P", "-c", START], ["-m", "lora_fx.cli"]):
        got = run([*start, *LINES["merge"].split(), "--force"], scene, **variables)
        assert not canary.exists(), canary.read_text()
        assert got.returncode == 0, got.stderr


@pytest.mark.parametrize("entries", ["", ":", "/nowhere:", ":/nowhere", "/nowhere::/nowhere"])
def test_a_chat_template_is_rendered_apart_from_the_current_folder(
    entries: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = lay_traps(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", entries)
    template = ChatTemplate("{{ messages[0].content }}", "m", {}, marked=False)
    found = template.render({"line 1": {"messages": [{"role": "user", "content": "hi"}]}})
    assert not canary.exists(), canary.read_text()
    assert found["line 1"].text == "hi"


def test_a_folder_that_pythonpath_names_stays_one(tmp_path: Path) -> None:
    show = "import lora_fx.cli, sys; print(*sys.path, sep='\\n')"
    got = run(["-P", "-c", show], tmp_path, PYTHONPATH=f":{tmp_path}")
    assert str(tmp_path) in got.stdout.splitlines(), got.stderr


# Modules beside a factory.


FACTORY = """
import torch
from {imported} import VALUE


def build():
    torch.manual_seed(VALUE)
    return torch.nn.Linear(3, 2), (torch.ones(4, 3),), {{}}
"""


ALONE = FACTORY.replace("from {imported} import VALUE", "VALUE = 1").format()
"""The same without a module beside it."""


@pytest.mark.parametrize(
    "name",
    [
        "sklearn",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("sqlite3", "wave", "gguf", "PIL")),
    ],
)
def test_a_library_comes_before_the_module_beside_a_factory(name: str, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(ALONE + f"\nimport {name}\n")
    canary = lay_traps(tmp_path)
    for spec in ("plain.py:build", "plain:build"):
        got = run(["-P", "-c", START, "targets", spec], tmp_path)
        assert not canary.exists(), canary.read_text()
        assert got.returncode == 0, got.stderr


@pytest.mark.parametrize("spec", ["{0}.py:build", "{0}:build"])
@pytest.mark.parametrize("helper", ["helper", "utils", "model_parts", "parts.inner"])
def test_a_helper_beside_a_factory_is_found(
    spec: str, helper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"{helper.replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text("VALUE = 3\n")
    name = f"factory_{helper.replace('.', '_')}_{len(spec)}"
    (tmp_path / f"{name}.py").write_text(FACTORY.format(imported=helper))
    before, finders = list(sys.path), list(sys.meta_path)
    for imported in ("helper", "utils", "model_parts", "parts", "parts.inner"):
        monkeypatch.delitem(sys.modules, imported, raising=False)
    module, _, _ = call_factory(spec.format(name))
    assert module.weight.shape == (2, 3)
    assert sys.path == before and sys.meta_path == finders


def test_places_of_imports_keep_their_order_for_other_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block's own place goes, of equal ones the last, in one step."""
    before = [str(tmp_path), *sys.path]
    seen = []

    class Places(list[str]):
        def reverse(self) -> None:
            super().reverse()
            seen.append([*self])

        def __delitem__(self, at: Any) -> None:
            super().__delitem__(at)
            seen.append([*self])

    monkeypatch.setattr(sys, "path", Places(before))
    with importable(str(tmp_path)):
        assert sys.path == [*before, str(tmp_path)]
    assert sys.path == before and seen == [before]


@pytest.mark.parametrize("name", ["json", "queue", "sklearn"])
def test_a_factory_may_have_the_name_of_a_library(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is run, and takes nobody's place."""
    monkeypatch.chdir(tmp_path)
    before = sys.modules.get(name)
    (tmp_path / f"{name}.py").write_text(ALONE)
    module, _, _ = call_factory(f"{name}:build")
    assert module.weight.shape == (2, 3)
    assert sys.modules.get(name) is before


def test_an_installed_package_that_is_not_needed_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "some_utils.py").write_text("VALUE = 'installed'\n")
    work = tmp_path / "work"
    work.mkdir()
    (work / "some_utils.py").write_text("VALUE = 5\n")
    (work / "gives_way.py").write_text(FACTORY.format(imported="some_utils"))
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.delitem(sys.modules, "some_utils", raising=False)
    call_factory(f"{work / 'gives_way.py'}:build")
    assert sys.modules.pop("some_utils").VALUE == 5
