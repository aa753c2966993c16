"""Try lora-fx-light as others install it: `python -m tests.light [PYTHON...]`.

The two distributions are built from the files of this checkout, without a warning, and no file is
in both. For each interpreter there is a new environment, in which lora-fx-light is downloaded and
installed (bytes and seconds are printed), merges an adapter, is installed and removed before and
after lora-fx (without the dependencies of lora-fx: no torch), and runs all tests that need neither
torch nor onnx. The exit code is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "safetensors", "gguf")
"""What the tests need beside the dependencies of lora-fx-light."""
TEST_LIBRARIES = {"_pytest", "pytest", "hypothesis", "safetensors", "xdist"}
OTHER = {"torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "peft", "transformers"}
"""Libraries without which tests are skipped."""
FOLDERS = ("adapter", "checkpoint", "cli", "files", "formats", "ir", "targets", "trust")
"""The folders of tests/ that have tests for lora-fx-light."""
LEFT_OUT = {
    "tests/formats/test_registry.py::test_nothing_else_knows_a_format": "reads all source files",
    "tests/formats/test_registry.py::test_no_other_page_lists_the_formats": "reads all pages",
    "tests/formats/test_registry.py::test_how_to_extend_lists_the_members": "reads passes/README",
    "tests/cli/test_process_end.py::test_the_end_visits_no_objects_and_flushes_files": (
        "runs lora-fx targets in a process of its own"
    ),
}
"""Tests that need all of lora-fx without importing it → why."""
NOT_PASSED_ON = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
"""Variables of the environment that would change what is measured, or the warnings of a build."""
MOST_BYTES = 60_000_000
"""The most that an installation may download."""


def _module(path: Path) -> ModuleType:
    """Import a file of light/, which is no package of this checkout."""
    spec = importlib.util.spec_from_file_location(f"light_{path.stem.strip('_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_parts = _module(ROOT / "light" / "parts.py")
parts, LIBRARIES = _parts.parts, _parts.LIBRARIES
COMMANDS = _module(ROOT / "light" / "lora_fx_light" / "__init__.py").COMMANDS


# Hooks of pytest, for the run without torch: `-p tests.light`.

missed: list[str] = []
"""The left-out modules that the running test asked for."""


class Missed:
    """A finder that notes which left-out modules are asked for, before lora-fx-light's refuses."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.startswith("lora_fx."):
            missed.append(name)


def pytest_configure() -> None:
    """Refuse left-out modules as lora-fx-light does."""
    from lora_fx_light import LeftOut

    sys.meta_path += [Missed, LeftOut]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """Skip a test whose fixtures need what is left out."""
    yield from _skipping()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Skip a test that needs what is left out."""
    yield from _skipping()


def _skipping() -> Generator[None, None, None]:
    missed.clear()
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in OTHER:
            missed.append(error.name or "")
        if not missed:
            raise
        pytest.skip(f"needs {missed[0]}")


def tests_that_run(root: Path) -> Iterator[Path]:
    """Yield the files of tests/ that can be imported without torch and onnx."""
    product = dict(_parts.modules_below(root / "lora_fx"))
    here = parts(root / "lora_fx", COMMANDS)
    known = {*LIBRARIES, *TEST_LIBRARIES, *sys.stdlib_module_names}

    def runs(path: Path) -> bool:
        return all(map(is_there, _parts.imports_of(path).at_once))

    def is_there(imported: str) -> bool:
        first, _, _ = imported.partition(".")
        if first == "lora_fx":
            module = imported if imported in product else imported.rpartition(".")[0]
            return module in here
        if first == "tests":
            path = root.joinpath(*imported.split("."))
            helpers = (path.with_suffix(".py"), path.parent.with_suffix(".py"))
            return all(runs(helper) for helper in helpers if helper.is_file())
        return first in known

    for folder in FOLDERS:
        for path in sorted((root / "tests" / folder).glob("test_*.py")):
            if runs(path):
                yield path


def copy_of_checkout(folder: Path) -> Path:
    """Copy the files that git knows, since a build writes into the folder that it builds."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).rstrip("\0").split("\0")
    for name in names:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a program and return its output; raise if it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON}
    command = [*map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """A block whose seconds are printed, and those of a processor in the programs that it runs."""
    began, used = time.monotonic(), _used_by_children()
    yield
    seconds, of_processor = time.monotonic() - began, _used_by_children() - used
    print(f"{what} {seconds:.1f} s ({of_processor:.1f} s of a processor)", flush=True)


def _used_by_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def built(source: Path, dist: Path) -> Path:
    """Build a wheel; raise if the build prints a warning."""
    before = set(dist.glob("*.whl"))
    said = run(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", dist, source)
    warnings = [line for line in said.splitlines() if "warning" in line.lower()]
    if warnings:
        raise SystemExit(f"{source.name}: the build warns:\n" + "\n".join(warnings))
    (wheel,) = set(dist.glob("*.whl")) - before
    return wheel


def files_of(wheel: Path) -> set[str]:
    """The files that a wheel installs, its scripts included."""
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entries,) = (n for n in names if n.endswith("entry_points.txt"))
        lines = archive.read(entries).decode().splitlines()
    return names | {f"bin/{line.partition('=')[0].strip()}" for line in lines if "=" in line}


MAKE_PAIR = """
import numpy as np
from lora_fx_light import lora_fx
rng = np.random.default_rng(0)
a, b = rng.standard_normal((8, 512), 'f4'), rng.standard_normal((1024, 8), 'f4')
lora_fx.save_adapter(lora_fx.Adapter({'w.weight': lora_fx.LowRank(a, b, 16.0)}), 'adapter')
w = rng.standard_normal((1024, 512), 'f4')
header = b'{"w.weight":{"dtype":"F32","shape":[1024,512],"data_offsets":[0,2097152]}}'
open('base.safetensors', 'wb').write(len(header).to_bytes(8, 'little') + header + w.tobytes())
"""


def try_in(interpreter: str, light: Path, whole: Path, folder: Path) -> None:
    """Install, merge, remove and test in a new environment of an interpreter.

    Args:
        interpreter: The Python to try.
        light: The wheel of lora-fx-light.
        whole: The wheel of lora-fx.
        folder: An empty folder beside the source that the wheels were built from.
    """
    print(run(interpreter, "--version").strip(), flush=True)
    run(interpreter, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
    downloads = folder / "downloads"
    run(*pip, "download", "--no-cache-dir", "-d", downloads, light)
    sizes = {path.name: path.stat().st_size for path in downloads.iterdir()}
    total = sum(sizes.values())
    print(json.dumps(sizes, indent=1), f"{total} bytes to download", sep="\n")
    if total > MOST_BYTES:
        raise SystemExit(f"{total} bytes are more than {MOST_BYTES}")

    with timed("download and installation"):
        run(*pip, "install", "--no-cache-dir", light)
    work = folder / "work"
    work.mkdir()
    command = folder / "venv" / "bin" / "lora-fx-light"
    run(python, "-c", MAKE_PAIR, cwd=work)
    merge = [command, "merge", "base.safetensors", "adapter", "-o"]
    for name in ("first", "second"):
        with timed(f"{name} merge"):
            run(*merge, f"{name}.safetensors", cwd=work)
    verify = [command, "verify", "first.safetensors", "base.safetensors", "--adapter", "adapter"]
    run(*verify, cwd=work)

    whole_command = folder / "venv" / "bin" / "lora-fx"
    run(*pip, "install", "--no-deps", whole)
    run(whole_command, "doctor", "base.safetensors", "adapter", cwd=work)
    run(*verify, cwd=work)
    run(*pip, "uninstall", "-y", "lora-fx-light")
    run(whole_command, "doctor", "base.safetensors", "adapter", cwd=work)
    run(*pip, "install", "--no-deps", light)
    run(*pip, "uninstall", "-y", "lora-fx")
    run(*verify, cwd=work)
    left = [str(path) for path in (folder / "venv").rglob("*lora*fx*") if "light" not in str(path)]
    if left:
        raise SystemExit(f"removing lora-fx left {left}")
    print("each was installed and removed beside the other")

    run(*pip, "install", *TOOLS)
    root = folder / "tree"
    shutil.copytree(folder.parent / "source", root, symlinks=True)
    files = [str(path.relative_to(root)) for path in tests_that_run(root)]
    for name in ("lora_fx", "passes", "cli"):  # so that the tests find what is installed
        shutil.rmtree(root / name)
    modules = run(python, "-c", "import lora_fx_light; print(lora_fx_light.MODULES)").strip()
    (Path(modules).parent.parent / "modules.pth").write_text(f"{modules}\n")
    options = ["-q", "-n", "2", "-p", "tests.light", *(f"--deselect={name}" for name in LEFT_OUT)]
    command_of_tests = [python, "-m", "pytest", *options, *files]
    if subprocess.run([*map(str, command_of_tests)], cwd=root, check=False).returncode:
        raise SystemExit(f"{interpreter}: the tests fail")


def main(arguments: Sequence[str]) -> None:
    """Build both distributions, and try them with each interpreter."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.light",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("interpreters", nargs="*", metavar="PYTHON", default=[sys.executable])
    interpreters = parser.parse_args(arguments).interpreters
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = copy_of_checkout(folder / "source")
        whole, light = (built(place, folder) for place in (source, source / "light"))
        both = files_of(whole) & files_of(light)
        if both:
            raise SystemExit(f"these files are in both: {sorted(both)}")
        for page in ("lora_fx/report", "lora_fx_light/modules/lora_fx/report"):
            if f"{page}/templates/page.html.j2" not in files_of(whole) | files_of(light):
                raise SystemExit(f"{page} has no templates")
        print(f"{light.name}: {light.stat().st_size} bytes, {len(files_of(light))} files")
        for number, interpreter in enumerate(interpreters):
            place = folder / str(number)
            place.mkdir()
            try_in(interpreter, light, whole, place)


if __name__ == "__main__":
    main(sys.argv[1:])
