"""The placement table: a row for each file of cases.py, as data in table.json.

The rows of one version of ONNX Runtime stand together, with the versions of the libraries that the
files were exported with. Where all of these are installed, rows are compared whole. Under other
versions nodes are fused and placed otherwise, so only the number of copies is compared, and whether
a CUDA graph can be captured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lora_fx
from lora_fx.errors import one_line
from lora_fx.onnx.cuda_obstacles import cuda_obstacles
from tests.cuda import stand_in
from tests.cuda.cases import CASES, Case

TABLE = Path(__file__).with_name("table.json")
PLACED = Path(__file__).with_name("placed.py")
LIBRARIES = ("torch", "onnxscript", "transformers", "timm")
WHY_NOT_EXPORTED = "not exported"
PATHS = re.compile(r"(?<![\w./])/\S+")
"""Paths in a message, which are those of one machine."""

Row = Mapping[str, Any]
"""What row_of of placed.py returns, or the one field "not exported", with the reason."""


def measured(case: Case, stand_in_folder: Path, folder: Path) -> Row:
    """The row of one file, which is exported into a folder and asked about in a child process."""
    try:
        path = case.export(folder)
    except lora_fx.LoraFxError as error:
        return {WHY_NOT_EXPORTED: one_line(PATHS.sub("…", error.message), 160)}
    child = stand_in.run_with(stand_in_folder, PLACED, path)
    assert child.returncode == 0, child.stderr
    row: Row = json.loads(child.stdout)
    return row


def disagreement(case: Case, row: Row, folder: Path) -> str:
    """How the list of cuda_obstacles differs from a measured row; empty where it does not."""
    import onnx_ir

    if WHY_NOT_EXPORTED in row:
        return ""
    obstacles = cuda_obstacles(onnx_ir.load(case.export(folder)))
    obstructed = "refused" in row or bool(row["copies"])
    if bool(obstacles) == obstructed:
        return ""
    return f"lora_fx lists {[str(obstacle) for obstacle in obstacles]}, the provider: {row}"


class Table:
    """The rows of one version of ONNX Runtime: of the installed one, or else of the newest."""

    def __init__(self) -> None:
        self.versions: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        self.installed = {name: _public_version(name) for name in LIBRARIES}
        self.runtime = _runtime_version()
        self.of_version = self.runtime if self.runtime in self.versions else self._newest()
        stored = self.versions.get(self.of_version, {"exported with": {}, "rows": {}})
        self.rows: dict[str, dict[str, Row]] = stored["rows"]
        self.compares_whole_rows = (
            self.of_version == self.runtime and stored["exported with"] == self.installed
        )

    def _newest(self) -> str:
        return max(self.versions, key=lambda text: [int(n) for n in text.split(".")], default="")

    def row(self, case: Case) -> Row | None:
        """The stored row of a file, if there is one."""
        return self.rows.get(case.family, {}).get(case.mode)

    def difference(self, case: Case, row: Row) -> str:
        """How a measured row differs from the stored one, in a line; empty where it does not."""
        stored = self.row(case)
        if stored is None:
            return "the table has no such row: python -m tests.cuda --write"
        before, after = stored, row
        if not self.compares_whole_rows or WHY_NOT_EXPORTED in row:
            before, after = across_versions(stored), across_versions(row)
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        return "; ".join(f"{name}: {before.get(name)} → {after.get(name)}" for name in names)

    def write(self, rows: Mapping[Case, Row]) -> None:
        """Store measured rows as those of the installed version."""
        kept = self.rows if self.of_version == self.runtime else {}
        everything = {Case(f, m): row for f, modes in kept.items() for m, row in modes.items()}
        everything.update(rows)
        by_family: dict[str, dict[str, Row]] = {}
        for case in CASES:
            if case in everything:
                by_family.setdefault(case.family, {})[case.mode] = everything[case]
        self.versions[self.runtime] = {"exported with": self.installed, "rows": by_family}
        TABLE.write_text(_one_row_a_line(self.versions))


def across_versions(row: Row) -> Row:
    """The part of a row that is the same under other versions."""
    if WHY_NOT_EXPORTED in row:
        return {WHY_NOT_EXPORTED: True}
    if "refused" in row:
        return row
    return {"copies": len(row["copies"]), "capturable": not row["uncapturable"]}


def _runtime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _public_version(name: str) -> str:
    """A library's version without the part after +, which says for which device it was built."""
    return version(name).partition("+")[0]


def _one_row_a_line(versions: Mapping[str, Any]) -> str:
    blocks = []
    for runtime, stored in versions.items():
        families = []
        for family, modes in stored["rows"].items():
            rows = [f"    {_text(mode)}: {_text(row)}" for mode, row in modes.items()]
            families.append(f"   {_text(family)}: {{\n" + ",\n".join(rows) + "\n   }")
        exported = _text(stored["exported with"])
        blocks.append(
            f' {_text(runtime)}: {{\n  "exported with": {exported},\n  "rows": {{\n'
            + ",\n".join(families)
            + "\n  }\n }"
        )
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
