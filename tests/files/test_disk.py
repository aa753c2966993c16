"""A disk that is really full."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import check_space, replacing
from lora_fx.files.copying import preallocate, write_at


def _pwrite(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for i in range(30):
            write_at(fd, bytes(1 << 20), i << 20)
    finally:
        os.close(fd)


def _reserve(path: Path) -> None:
    with path.open("wb") as f:
        preallocate(f.fileno(), 30 << 20)
        pytest.fail("30 MB reserved on 20")


@pytest.mark.parametrize("fill", [_pwrite, _reserve, lambda p: p.write_bytes(bytes(30 << 20))])
def test_a_20_mb_disk(small_disk: Path, fill: Callable[[Path], None]) -> None:
    out = small_disk / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(LoraFxError, match="out: disk full"), replacing(out, force=True) as t:
        t.mkdir()
        fill(t / "big")
    assert (out / "old").read_text() == "old" and os.listdir(small_disk) == ["out"]
    with pytest.raises(LoraFxError, match=r"2\d\.\d MB free; expected at least 30\.0 MB"):
        check_space(small_disk, 30_000_000)
    check_space(small_disk, 10_000_000)


def test_space_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="no such file"):
        check_space(tmp_path / "gone", 1)
