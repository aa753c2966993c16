"""Make the tables of docs/numbers.md and docs/times.md from the data of the benchmarks.

    python -m tests.benchmarks.numbers

A page has its prose, and for each benchmark two lines between which its tables stand:

    <!-- results: step -->
    <!-- end of results -->

`results: capture insert` is for those tables of `capture` whose heading begins with "insert".
`results: gates` is the table of all gates by family of processors, and `results: times` shows the
tables of `times`, which hold one command and one size each, side by side.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

from tests.benchmarks.kept import FOLDER, Row, Table, load, markdown, shown

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("numbers.md", "times.md")
PLACE = re.compile(r"(<!-- results: (\w+)( [^\n]*)? -->\n).*?(<!-- end of results -->)", re.S)


def origin(table: Table) -> str:
    """Where and how a table was measured, as a sentence."""
    parts = [table.family]
    if table.cores:
        parts.append(f"{table.cores} cores")
    if table.load:
        parts.append(table.load)
    if table.date:
        parts.append(table.date)
    if table.commit:
        parts.append(f"lora-fx {table.commit}")
    parts += [f"{library} {release}" for library, release in table.versions.items()]
    command = f"`{table.command}`. " if table.command else ""
    note = f" {table.note}" if table.note else ""
    return f"{command}{', '.join(parts)}.{note}"


def tables(name: str, start: str = "") -> str:
    """The tables of a benchmark whose heading begins with a text.

    Those of one run stand below one sentence about their origin.
    """
    chosen = [table for table in load(name) if table.what.startswith(start)]
    blocks: list[str] = []
    for sentence, group in groupby(chosen, origin):
        blocks += [sentence, *(markdown(table.what, table.rows) for table in group)]
    return "\n\n".join(blocks)


def gates() -> str:
    """Every gate, and what its row is on each family: the table that was added last counts."""
    found: dict[tuple[str, str], Row] = {}
    families: dict[str, None] = {}
    for path in sorted(FOLDER.glob("*.json")):
        for table in load(path.stem):
            for row in (row for row in table.rows if "gate" in row):
                families[table.family] = None
                what = f"`{path.stem}`: {table.what.partition(':')[0]}: {row['what']}"
                cells = found.setdefault((what, row["gate"]), {})
                cells[table.family] = (
                    f"{shown(row['ratio'])} ({shown(row['limit'])}) {shown(row['held'])}"
                )
    rows = [
        {"what": what, "gate": gate, **{name: cells.get(name, "") for name in families}}
        for (what, gate), cells in found.items()
    ]
    return markdown("row", rows)


def times() -> str:
    """What the commands take, a row for each command and a column for each size, by family."""
    blocks: list[str] = []
    found = load("times")
    for family in dict.fromkeys(table.family for table in found):
        of_family = [table for table in found if table.family == family]
        parts = {table.what: table.rows[0]["parameters"] for table in of_family}
        sizes = sorted(parts, key=lambda size: parts[size])
        for figure, heading in (("CPU s", "seconds of CPU"), ("peak MB", "peak of memory, MB")):
            rows: dict[str, Row] = {}
            for name in dict.fromkeys(table.note for table in of_family):
                rows[name] = {"what": f"`{name}`", **{_millions(parts[s]): "" for s in sizes}}
            for table in of_family:
                rows[table.note][_millions(parts[table.what])] = table.rows[0][figure]
            blocks.append(markdown(heading, list(rows.values())))
        days = ", ".join(dict.fromkeys(f"{table.load}, {table.date}" for table in of_family))
        commits = ", ".join(dict.fromkeys(table.commit.rstrip("+") for table in of_family))
        blocks.append(f"{family}, {of_family[0].cores} cores, {days}; lora-fx {commits}.")
    return "\n\n".join(blocks)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.3g} M" if parameters < 1e9 else f"{parameters / 1e9:.3g} B"


def filled(page: str) -> str:
    """The text of a page with the tables that the data gives."""

    made_by = {"gates": gates, "times": times}

    def fill(place: re.Match[str]) -> str:
        name = place[2]
        made = made_by[name]() if name in made_by else tables(name, (place[3] or "").strip())
        return f"{place[1]}\n{made}\n\n{place[4]}"

    return PLACE.sub(fill, page)


def main() -> None:
    """Write the pages whose tables have changed."""
    for name in PAGES:
        path = DOCS / name
        text = path.read_text()
        made = filled(text)
        if made != text:
            path.write_text(made)
            print(f"docs/{name} is written")


if __name__ == "__main__":
    main()
