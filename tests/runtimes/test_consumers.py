"""The stored rows of the table of consumers, and the environments, are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.runtimes import consumers, environments


def test_a_row_is_stored_once_and_in_order() -> None:
    keys = [row.key for row in consumers.stored_rows()]
    assert keys == sorted({*keys})


def test_requirements_are_pinned() -> None:
    for name in environments.names():
        for line in environments.requirements_of(name).splitlines():
            assert re.fullmatch(r"[\w.\[\]-]+==[\w.+]+|--\S+ \S+|#.*|", line), (name, line)


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
