"""Commands on folders that name other models ask nobody and open nothing of theirs, by strace."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.hostile import traced

STRACE = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@STRACE
@pytest.mark.slow
@pytest.mark.parametrize("name", traced.FOLDERS)
def test_a_folder_that_names_another_model_opens_nothing_of_it(name: str, tmp_path: Path) -> None:
    for row in traced.rows(sys.executable, list(traced.LINES), [name], tmp_path):
        assert row["exit"] in (0, 1, 2) and not row["ran"], row
        assert not row["asked"] and not row["beyond"], row


@STRACE
@pytest.mark.slow
def test_the_trace_sees_what_is_opened_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = traced.scene("llama", {}, tmp_path / "x")
    code = (
        "import socket, sys; open('../elsewhere/evil.bin').close()\n"
        "s = socket.socket(); s.connect_ex(('127.0.0.1', 9))"
    )
    monkeypatch.setattr(traced, "START", code)
    got = traced.trace(sys.executable, "targets m", folder)
    assert len(got.asked) == 1 and str(tmp_path / "x/elsewhere/evil.bin") in got.opened
