"""Where ONNX Runtime's CUDA provider puts the nodes of exported files, against the stored table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.cases import CASES, Case
from tests.cuda.table import Table, across_versions, disagreement, measured

QUICK = {
    *(("tied_head", mode) for mode in ("merged", "switch", "load", "batch", "switch int4")),
    ("tied_head", "int8 for cuda"),
    ("torch_cond", "merged"),
    ("lstm", "merged"),
}
"""Rows of the default run: a file of each mode, control flow, and what cannot be opened."""
SWITCHED = {
    "merged": "switch",
    "merged float16": "switch of float16",
    "merged optimised": "switch of optimised",
    "optimised for cuda": "switch of optimised for cuda",
    "float16 optimised for cuda": "switch of float16 optimised for cuda",
    "int4 float16 for cuda": "switch of int4 float16 for cuda",
    "cache merged": "cache switch",
    "cache merged for cuda": "cache switch for cuda",
}
"""Modes of a plain graph → those of the same graph with branches."""
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


def test_files_for_cuda_copy_nothing() -> None:
    """Of each family whose merged file for the CPU copies nothing: control flow and sizes that
    depend on data are the model's own, and CUDA has no kernels for products of int8."""
    rows = {
        (family, mode): row
        for family, modes in Table().rows.items()
        if modes["merged"].get("uncapturable") == ""
        for mode, row in modes.items()
        if mode.endswith("for cuda") and mode != "int8 for cuda" and row.keys() != {"not exported"}
    }
    assert {family for family, _ in rows} >= {"hf_bert", "hf_gpt2", "hf_llama"}
    assert {key: row.get("copies") for key, row in rows.items()} == {key: [] for key in rows}
    assert {key: row["uncapturable"] for key, row in rows.items()} == dict.fromkeys(rows, "")


@pytest.mark.parametrize(
    ("family", "operator"),
    [
        ("hf_bert", "SkipLayerNormalization"),
        ("hf_gpt2", "SkipLayerNormalization"),
        ("hf_llama", "SkipSimplifiedLayerNormalization"),
    ],
)
def test_sums_and_norms_stay_one_operator_in_files_for_cuda(family: str, operator: str) -> None:
    rows = Table().rows[family]
    for mode in ("optimised", "switch of optimised"):
        assert rows[f"{mode} for cuda"]["fused"][operator] == 4
    assert operator not in rows["merged optimised"]["fused"]


@pytest.mark.parametrize(("base", "switched"), SWITCHED.items())
def test_switch_keeps_the_fused_operators_of_its_base(base: str, switched: str) -> None:
    """Gemm apart: a product over a bias is none where a branch is added before the bias."""
    compared = 0
    lost = {}
    for family, modes in Table().rows.items():
        before = modes.get(base, {}).get("fused")
        after = modes.get(switched, {}).get("fused")
        if before is None or after is None:
            continue
        compared += 1
        for name, number in before.items():
            if name != "Gemm" and after.get(name, 0) < number:
                lost[family, name] = (number, after.get(name, 0))
    assert compared >= 2
    assert lost == {}


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
