"""The table of consumers as data: what each runtime does with a kind of file, cell by cell.

A test measures a row and calls `agree`, which compares it with the stored one; with
`python -m tests.runtimes NAME --write` it is stored instead. The table in the documentation is made
of the stored rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

STORED = Path(__file__).parent / "consumers.json"
WRITE = "LORA_FX_WRITE_CONSUMERS"
"""The environment variable that makes `agree` store rows."""

Cell = bool | str
"""True for equal to torch or for done, False for not; a few words where neither says enough."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one version of a runtime does with one file.

    Attributes:
        runtime: The name of the runtime, with its backend where it has several.
        version: Its version.
        file: The kind of the file: onnx or pt2.
        mode: The mode that the file was exported in.
        model: A name in models.py, or a number of models of the zoo.
        loads: Whether the file is loaded.
        base: Whether the run without an adapter equals torch.
        adapter_a: Whether the run with the first adapter does.
        adapter_b: The same for the second.
        swap: Whether adapters change place without loading or compiling the file again.
        ids_out_of_range: What the runtime does with an index that a lookup has no row for.
        dynamic_sizes: Whether other sizes than those of the example are right.
        figures: Measured numbers by name, with the unit in the name; they are not compared.
    """

    runtime: str
    version: str
    file: str
    mode: str
    model: str
    loads: Cell
    base: Cell = ""
    adapter_a: Cell = ""
    adapter_b: Cell = ""
    swap: Cell = ""
    ids_out_of_range: Cell = ""
    dynamic_sizes: Cell = ""
    figures: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells rows apart; a new version takes the place of the old one."""
        return (self.runtime, self.file, self.mode, self.model)


CELLS = tuple(f.name for f in fields(Row) if f.name not in ("figures",))


def stored_rows() -> list[Row]:
    """The rows of the table, in its order."""
    if not STORED.exists():
        return []
    return [Row(**row) for row in json.loads(STORED.read_text(encoding="utf-8"))]


def agree(row: Row) -> None:
    """Compare a measured row with the stored one; store it where the caller was asked to."""
    rows = {stored.key: stored for stored in stored_rows()}
    if os.environ.get(WRITE):
        rows[row.key] = row
        data = [asdict(rows[key]) for key in sorted(rows)]
        STORED.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        return
    hint = "python -m tests.runtimes NAME --write stores it"
    assert row.key in rows, f"{row.key} is not in {STORED.name}: {hint}"
    assert rows[row.key] == row, f"{row} differs from {STORED.name}: {hint}"
