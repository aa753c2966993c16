"""The stored rows of the table of consumers, and the environments, are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.runtimes import consumers, environments, page


def test_a_row_is_stored_once_and_in_order() -> None:
    keys = [row.key for row in consumers.stored_rows()]
    assert keys == sorted({*keys})


def test_requirements_are_pinned() -> None:
    for name in environments.names():
        for line in environments.requirements_of(name).splitlines():
            assert re.fullmatch(r"[\w.\[\]-]+==[\w.+]+|--\S+ \S+|#.*|", line), (name, line)


@pytest.mark.parametrize("sample", ["openvino_switch.py"])
def test_a_page_has_the_whole_sample(sample: str) -> None:
    code = (environments.ROOT / "samples" / "runtimes" / sample).read_text(encoding="utf-8")
    pages = (environments.ROOT / "docs" / "runtimes").glob("*.md")
    begin = code.index("import sys")
    assert any(code[begin:] in page.read_text(encoding="utf-8") for page in pages)


def test_a_measured_row_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "STORED", tmp_path / "consumers.json")
    monkeypatch.setenv(consumers.WRITE, "1")
    row = consumers.Row(
        runtime="r", version="1", file="onnx", mode="switch", model="m", loads=True,
        figures={"swap_ms": 1.0},
    )  # fmt: skip
    consumers.agree(row)
    monkeypatch.delenv(consumers.WRITE)
    again = consumers.Row(**{**vars(row), "figures": {"swap_ms": 2.0}})
    consumers.agree(again)
    with pytest.raises(AssertionError, match="differs"):
        consumers.agree(consumers.Row(**{**vars(row), "loads": False}))
    with pytest.raises(AssertionError, match="is not in"):
        consumers.agree(consumers.Row(**{**vars(row), "model": "other"}))


def test_the_page_has_the_rows() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.with_table(text, consumers.stored_rows()), "python -m tests.runtimes.page"


def test_a_cell_says_for_which_models_it_holds() -> None:
    rows = [
        consumers.Row(
            runtime="r", version="1", file="onnx", mode="switch", model=model, loads=True,
            base=model != "b",
        )
        for model in ("a", "b")
    ]  # fmt: skip
    line = page.table(rows).splitlines()[-1]
    assert line == "| .onnx, switch | r 1 | yes | yes: a; **no**: b | – | – | – | – | – |"
