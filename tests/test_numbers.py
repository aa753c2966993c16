"""The tables of the documentation are those of the benchmarks' data."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks import kept
from tests.benchmarks.kept import FOLDER, Table, add_keep, gated, load, markdown, report, shown
from tests.benchmarks.numbers import DOCS, PAGES, filled
from tests.processors import family

EPYC = "model name : AMD EPYC 7B13\ncpu family : 25\nflags : fpu avx2\n"
XEON = "model name : Intel(R) Xeon(R) Platinum\ncpu family : 6\nflags : avx2 avx512f amx_tile\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results."""
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_tables_that_the_data_gives(page: str) -> None:
    text = (DOCS / page).read_text()
    assert text == filled(text), "run python -m tests.benchmarks.numbers"


def test_every_table_of_the_data_stands_on_one_page() -> None:
    pages = "\n".join((DOCS / page).read_text() for page in PAGES)
    for path in FOLDER.glob("*.json"):
        if path.stem == "times":
            continue  # its tables stand side by side in two
        for table in load(path.stem):
            assert pages.count(markdown(table.what, table.rows)) >= 1, (path.stem, table.what)


def test_every_time_stands_on_the_page_of_times() -> None:
    page = (DOCS / "times.md").read_text()
    assert load("times")
    for table in load("times"):
        (row,) = table.rows
        lines = [line for line in page.splitlines() if line.startswith(f"| `{row['what']}` |")]
        assert any(f" {shown(row['CPU s'])} " in line for line in lines), row
        assert any(f" {shown(row['peak MB'])} " in line for line in lines), row


def test_a_page_with_changed_figures_is_filled_anew() -> None:
    page = "before\n<!-- results: depth -->\n| a | 1 |\n<!-- end of results -->\nafter\n"
    made = filled(page)
    assert made.startswith("before\n<!-- results: depth -->\n\n`python -m tests.benchmarks.depth")
    assert made.endswith("|\n\n<!-- end of results -->\nafter\n")
    assert "| a | 1 |" not in made
    assert filled(made) == made


def test_a_table_shows_all_figures() -> None:
    base = {"what": "cp", "median": 0.25, "ratio": 1.0}
    merge = gated({"what": "merge", "median": 0.789, "ratio": 3.156}, "2.50 × cp", 2.5)
    held = gated({"what": "touch", "ratio": 2.51, "MB": 12345}, "2.50 × cp", 2.5, lowest=2.49)
    assert markdown("seconds", [base, merge, held]).splitlines() == [
        "| seconds | median | ratio | gate | limit | held | MB |",
        "|---|---|---|---|---|---|---|",
        "| cp | 0.25 | 1.00 | | | | |",
        "| merge | 0.789 | 3.156 | 2.50 × cp | 2.50 | **missed** | |",
        "| touch | | 2.51 | 2.50 × cp | 2.50 | held | 12,345 |",
    ]


def test_a_run_takes_the_place_of_its_own_family_only(folder: Path) -> None:
    first = Table("seconds", [{"what": "cp", "median": 2.0}], "run", "AMD EPYC, family 25, AVX2")
    other = replace(first, family="Intel Xeon, family 6, AMX")
    again = replace(first, rows=[{"what": "cp", "median": 1.0}], date="2026-12-01")
    for table in (first, other, again):
        kept.store("merge", table)
    assert load("merge") == [again, other]


def test_a_run_is_stored_only_if_it_is_told_to(folder: Path) -> None:
    parser = argparse.ArgumentParser()
    add_keep(parser)
    rows = [{"what": "cp", "median": 1.0}]
    report("merge", "seconds", rows, parser.parse_args([]).keep)
    assert not folder.exists()
    report("merge", "seconds", rows, parser.parse_args(["--keep", "busy"]).keep)
    (table,) = load("merge")
    assert (table.rows, table.load, table.family) == (rows, "busy", family())
    assert table.date and table.commit and table.versions["torch"]


def test_the_command_of_a_table_stores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["step.py", "bert", "--keep", "quiet", "--rounds", "3"])
    assert kept.here("step").command == "python -m tests.benchmarks.step bert --rounds 3"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (EPYC, "AMD EPYC, family 25, AVX2"),
        (XEON, "Intel Xeon, family 6, AMX"),
    ],
)
def test_the_family_of_a_processor(cpuinfo: str, expected: str) -> None:
    assert family(cpuinfo) == expected
    assert family(cpuinfo + cpuinfo) == expected
