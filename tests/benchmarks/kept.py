"""The tables of benchmarks as data, kept by the family of the processor that they were measured on.

`tests/benchmarks/results/NAME.json` holds the tables of one benchmark. A benchmark prints its
tables, and with `--keep quiet` or `--keep busy` it also stores them there, in the place of an
earlier run of the same command on the same family. `python -m tests.benchmarks.numbers` makes the
tables of the documentation from these files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_fx.onnx.timing import summary
from tests.processors import family

FOLDER = Path(__file__).parent / "results"
LIBRARIES = ("torch", "onnxruntime", "onnxruntime-gpu", "transformers", "peft", "numpy")
"""Libraries whose release is stored beside the figures."""
Row = dict[str, Any]
"""`what` was measured, and its figures by the heading of their column.

A row that a gate holds has `gate`, `limit` and `held`, as `gated` adds them.
"""


@dataclass(frozen=True)
class Table:
    """Rows that were measured in one run, and where and how they were.

    Attributes:
        what: The heading of the first column: what is measured, and in which unit.
        rows: The first is the baseline of the ratios.
        command: What measures them again.
        family: Of the processor, as `tests.processors.family` names it.
        cores: How many of them the process could use; 0 where nobody recorded it.
        load: "quiet" or "busy": whether other jobs ran; empty where nobody recorded it.
        date: Of the run.
        commit: Of lora-fx.
        versions: Of the libraries.
        note: What else a reader has to know. Tables that differ in it do not replace each other.
    """

    what: str
    rows: list[Row]
    command: str = ""
    family: str = ""
    cores: int = 0
    load: str = ""
    date: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What a later run has to share with this one to take its place."""
        return self.what, self.command, self.family, self.note


def figures(
    what: str, seconds: Sequence[float], base: Sequence[float], places: int = 4, **more: Any
) -> Row:
    """A row of times: the median, the minimum, and their ratios to the baseline's.

    Args:
        what: Name of the row.
        seconds: One time for each round.
        base: The baseline's times in the same rounds.
        places: Significant digits.
        more: Further figures, by the heading of their column.
    """
    found = summary(seconds, base)
    row = {
        "median": found["median"],
        "min": found["min"],
        "ratio": found["ratio"],
        "min ratio": found["min_ratio"],
        **more,
    }
    return {"what": what, **{name: rounded(value, places) for name, value in row.items()}}


def rounded(value: Any, places: int = 4) -> Any:
    """A number with so many significant digits; anything else as it is."""
    return float(f"{value:.{places}g}") if isinstance(value, float) else value


def gated(row: Row, gate: str, limit: float, lowest: float | None = None) -> Row:
    """The row with its gate.

    Args:
        row: With a `ratio`.
        gate: What the limit is relative to, as a text: "2.50 × cp -r".
        limit: The largest ratio that passes.
        lowest: The lower bound of the ratio, which is compared in place of it.
    """
    compared = row["ratio"] if lowest is None else lowest
    return {**row, "gate": gate, "limit": rounded(limit), "held": compared <= limit}


def markdown(what: str, rows: Sequence[Row]) -> str:
    """A table in Markdown, a column for each figure that a row has."""
    headings = list(dict.fromkeys(name for row in rows for name in row if name != "what"))
    lines = [f"| {what} | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    for row in rows:
        cells = [row["what"], *(shown(row.get(name, "")) for name in headings)]
        lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    return "\n".join(lines)


def shown(value: Any) -> str:
    """The text of a cell."""
    if isinstance(value, bool):
        return "held" if value else "**missed**"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.4g}"
    return text if "." in text[:-2] or abs(value) >= 100 else f"{value:.2f}"


def load(name: str) -> list[Table]:
    """The tables of a benchmark, in the order in which they were added."""
    path = FOLDER / f"{name}.json"
    return [Table(**table) for table in json.loads(path.read_text())] if path.exists() else []


def store(name: str, table: Table) -> None:
    """Add a table, in the place of the one with its identity."""
    tables = load(name)
    places = [i for i, earlier in enumerate(tables) if earlier.identity == table.identity]
    if places:
        tables[places[0]] = table
    else:
        tables.append(table)
    text = json.dumps([asdict(one) for one in tables], indent=1, ensure_ascii=False)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(f"{text}\n")


def add_keep(parser: argparse.ArgumentParser) -> None:
    """Add the option that stores what a run measures."""
    parser.add_argument(
        "--keep",
        choices=("quiet", "busy"),
        help="store the tables for this processor's family; says whether other jobs ran",
    )


def report(name: str, what: str, rows: list[Row], keep: str | None) -> None:
    """Print a table, and store it if the run was told to.

    Args:
        name: Of the benchmark.
        what: Heading of the first column.
        rows: The baseline first.
        keep: The value of `--keep`.
    """
    print(f"\n{markdown(what, rows)}", flush=True)
    if keep:
        store(name, replace(here(name), what=what, rows=rows, load=keep))


def here(name: str) -> Table:
    """A table without rows, with all that is known of this run."""
    return Table(
        what="",
        rows=[],
        command=" ".join(["python -m", f"tests.benchmarks.{name}", *unkept(sys.argv[1:])]),
        family=family(),
        cores=cores(),
        date=str(datetime.date.today()),
        commit=commit(),
        versions=versions(),
    )


def unkept(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--keep` and its value."""
    if "--keep" not in arguments:
        return list(arguments)
    at = list(arguments).index("--keep")
    return [*arguments[:at], *arguments[at + 2 :]]


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0


def commit() -> str:
    """The commit of this checkout, with a + if files of it have changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", ":!/docs", f":!{FOLDER}"],
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Releases of the libraries that are installed."""
    found: dict[str, str] = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
