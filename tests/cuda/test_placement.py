"""Where ONNX Runtime's CUDA provider puts the nodes of exported files, against the stored table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.cases import CASES, Case
from tests.cuda.table import Table, across_versions, disagreement, measured

QUICK = {
    *(("tied_head", mode) for mode in ("merged", "switch", "load", "batch", "switch int4")),
    ("torch_cond", "merged"),
    ("lstm", "merged"),
}
"""Rows of the default run: a file of each mode, control flow, and what cannot be opened."""
ROWS = [
    pytest.param(
        case, id=str(case), marks=[pytest.mark.slow] * ((case.family, case.mode) not in QUICK)
    )
    for case in CASES
]


@pytest.mark.parametrize("case", ROWS)
def test_a_file_is_placed_as_the_table_says(case: Case, stand_in_folder: Path, files: Path) -> None:
    row = measured(case, stand_in_folder, files)
    assert Table().difference(case, row) == ""
    assert disagreement(case, row, files) == ""


def test_the_table_has_a_row_for_every_file_and_no_other() -> None:
    table = Table()
    stored = {Case(family, mode) for family, modes in table.rows.items() for mode in modes}
    assert stored == set(CASES)


def test_a_file_that_copies_is_never_captured() -> None:
    """This is the runtime's rule; the table has files on both sides of it."""
    rows = [across_versions(row) for modes in Table().rows.values() for row in modes.values()]
    placed = [row for row in rows if "copies" in row]
    assert {row["capturable"] for row in placed} == {True, False}
    assert all(row["capturable"] == (row["copies"] == 0) for row in placed)


def test_what_cannot_be_opened_says_why() -> None:
    refused = {
        family: str(row["refused"])
        for family, modes in Table().rows.items()
        for row in modes.values()
        if "refused" in row
    }
    assert "lstm" in refused
    assert all("cuDNN is unavailable" in why for why in refused.values())


@pytest.mark.parametrize("changed", ["copies", "capturable"])
def test_another_version_compares_copies_and_capture_alone(changed: str) -> None:
    table = Table()
    case = Case("tied_head", "merged")
    row = dict(table.row(case) or {})
    table.compares_whole_rows = False
    assert table.difference(case, {**row, "on_device": 99, "fused": {}}) == ""
    if changed == "copies":
        row["copies"] = ["Where → to host → Unique"]
    else:
        row["uncapturable"] = "the model has control flow nodes"
    assert changed in table.difference(case, row)
