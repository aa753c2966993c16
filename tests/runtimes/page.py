"""The table of consumers in docs/runtimes.md, made of the rows of consumers.json.

`python -m tests.runtimes.page` writes the table into the page. Rows of one file kind, mode and
runtime are one line: a cell that holds for all models is said once, and another names the models.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.runtimes.consumers import Cell, Row, stored_rows
from tests.runtimes.environments import ROOT

PAGE = ROOT / "docs" / "runtimes.md"
BEGIN = "<!-- table: python -m tests.runtimes.page -->"
END = "<!-- end of table -->"
COLUMNS = {
    "loads": "loads",
    "base": "base",
    "adapter_a": "adapter A",
    "adapter_b": "adapter B",
    "swap": "swap",
    "ids_out_of_range": "ids out of range",
    "dynamic_sizes": "dynamic sizes",
}
"""Cell of a row → its heading."""


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown, a line for each file kind, mode and runtime."""
    lines = [
        f"| file, mode | runtime | {' | '.join(COLUMNS.values())} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.file, row.mode, row.runtime, row.version), []).append(row)
    for (file, mode, runtime, version), of_group in sorted(groups.items()):
        cells = [
            _shown({row.model: getattr(row, column) for row in of_group}) for column in COLUMNS
        ]
        lines.append(f"| .{file}, {mode} | {runtime} {version} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(by_model: dict[str, Cell]) -> str:
    """A cell: what holds for all models, or what holds for which."""
    models_of: dict[str, list[str]] = {}
    for model, cell in by_model.items():
        if cell != "":
            models_of.setdefault(_word(cell), []).append(model)
    if not models_of:
        return "–"
    if len(models_of) == 1:
        return next(iter(models_of))
    return "; ".join(f"{word}: {', '.join(models)}" for word, models in models_of.items())


def _word(cell: Cell) -> str:
    """A cell of one row in words."""
    if isinstance(cell, bool):
        return "yes" if cell else "**no**"
    return cell


def with_table(page: str, rows: Sequence[Row]) -> str:
    """The text of the page with this table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), stored_rows()), encoding="utf-8")
