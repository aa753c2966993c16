"""Packages with adapter formats, made in a folder as pip would install them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_fx.cli import main

TOY = '''
"""Toy: one .toy file, b"TOY1", then JSON of the updates, then nothing."""

import json

import numpy as np

from lora_fx import Adapter, LowRank
from lora_fx.formats.format import Format, Magic
from lora_fx.formats.unsupported import refused


class Toy(Format):
    name = "toy"
    suffixes = (".toy",)
    magic = Magic(b"TOY1")
    one_model = True

    def read(self, path, base=None):
        rows = json.loads(path.read_bytes()[4:])
        entries = {}
        for key, row in rows.items():
            a, b = (np.array(row[half], np.float32) for half in "ab")
            entries[key] = LowRank(a, b, row["alpha"])
        return Adapter(entries, {"notes": ["a toy"]})

    def write(self, adapter, path, base=None):
        rows = {}
        for key, entry in adapter.entries.items():
            if not isinstance(entry, LowRank):
                raise refused("a .toy file", key, entry)
            alpha = entry.scale * entry.rank
            rows[key] = {"a": entry.a.tolist(), "b": entry.b.tolist(), "alpha": alpha}
        path.write_bytes(b"TOY1" + json.dumps(rows).encode())
        return ("toys have no layouts",)


TOY = Toy()
'''


def install(
    folder: Path, package: str, code: str = TOY, entries: Mapping[str, str] | None = None
) -> Path:
    """A package of one module, with what pip writes beside it.

    Args:
        folder: A place of imports; made where it is missing.
        package: The name of the package and of its module, with - for _.
        code: Of the module.
        entries: The entry points of formats by name.

    Returns:
        The module.
    """
    folder.mkdir(exist_ok=True)
    name = package.replace("-", "_")
    module = folder / f"{name}.py"
    module.write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in (entries or {"toy": f"{name}:TOY"}).items()]
    (info / "entry_points.txt").write_text("\n".join(["[lora_fx.formats]", *lines, ""]))
    return module


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def run(line: str) -> Done:
    """`lora-fx …` in this process."""
    sys.modules.pop("lora_fx.cli.convert", None)  # it lists the formats when it is imported
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(line.split())
        except SystemExit as stop:
            return Done(int(stop.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main always exits")


def child(*arguments: str, place: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, for which what lies in a folder is installed."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(place)}, capture_output=True, text=True,
    )  # fmt: skip
