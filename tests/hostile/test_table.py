"""Every hostile file and every command that could read it; outputs that are not replaced."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hostile import child
from tests.hostile.mutate import make
from tests.hostile.table import (
    ADAPTERS,
    FOLDERS,
    FORCED,
    INPUTS,
    ONNX,
    SLOW_ONNX,
    Case,
    thesis,
)  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One valid file of every kind."""
    child.prepare()
    folder = tmp_path_factory.mktemp("hostile") / "valid"
    folder.mkdir()
    make(folder)
    return folder


@pytest.fixture
def scene(valid: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of them."""
    folder = tmp_path / "scene"
    shutil.copytree(valid, folder, symlinks=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def seen(root: Path) -> dict[str, tuple[str, int, int]]:
    """What lies below a folder: kind and content, mode, links."""
    found = {}
    for path in sorted(root.rglob("*")):
        if "__pycache__" in path.parts:
            continue
        about = path.lstat()
        if stat.S_ISLNK(about.st_mode):
            what = f"-> {os.readlink(path)}"
        elif stat.S_ISREG(about.st_mode) and about.st_size < 1 << 24:
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = f"{stat.S_IFMT(about.st_mode)} {about.st_size * stat.S_ISREG(about.st_mode)}"
        found[str(path.relative_to(root))] = (what, stat.S_IMODE(about.st_mode), about.st_nlink)
    return found


def attack(case: Case, folder: Path) -> None:
    """Run the commands of a case; everything that is wrong is told at once."""
    case.make(folder)
    before = seen(folder.parent)
    wrong = []
    for line in case.lines:
        got = child.command(line.split(), folder, seconds=case.seconds)
        told = got.err.strip().splitlines()[-2:]
        answered = line.startswith(("doctor", "merge-all")) and got.code == 1 and got.out
        if answered:
            pass
        elif got.raw or got.code not in case.codes or (got.code == 2 and not got.refused):
            wrong.append(f"{line}: exit {got.code} {'hung' if got.hung else ''} {told}")
        if got.megabytes > child.MEGABYTES:
            wrong.append(f"{line}: {got.megabytes:.0f} MB")
        if case.say and case.say not in got.err:
            wrong.append(f"{line}: says {told}")
        if got.code in (1, 2) and (now := seen(folder.parent)) != before:
            wrong.append(f"{line}: wrote {sorted(set(now.items()) ^ set(before.items()))[:3]}")
        for out in folder.glob("out*"):
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert not wrong, "\n".join(wrong)


KINDS = {"onnx": ONNX, "folder": FOLDERS, "adapter": ADAPTERS, "input": INPUTS}
ALL = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


@pytest.mark.parametrize("name", ALL)
def test_hostile_files_are_refused(name: str, scene: Path) -> None:
    """By two of the commands that read such a file, other ones for each."""
    case, first = ALL[name], list(ALL).index(name)
    turned = (*case.lines, *case.lines)[first % len(case.lines) :]
    attack(replace(case, lines=turned[:2]), scene)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_hostile_files_are_refused_by_every_command(name: str, scene: Path) -> None:
    attack(ALL[name], scene)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_ONNX)
def test_large_hostile_files_are_refused(name: str, scene: Path) -> None:
    attack(SLOW_ONNX[name], scene)


def test_force_replaces_no_input_and_nobodys_work(scene: Path) -> None:
    slow = tuple(x for x in FORCED if x.startswith(("train", "plan", "insert net", "export net")))
    fast = tuple(x for x in FORCED if x not in slow)
    attack(Case(thesis, fast), scene)
    attack(Case(lambda folder: None, slow, seconds=60.0), scene)
