"""Standard streams that are closed or full, and a full disk that a library does not tell of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_fx import Adapter, LowRank, save_adapter
from lora_fx.checkpoint.merge_all import jobs_of
from lora_fx.errors import LoraFxError, explained
from lora_fx.onnx.runtime_adapter import write_file

MERGE = "merge base.safetensors peft -o out.safetensors --force"
MISSING = "merge base.safetensors nope -o out.safetensors --force"
ROWS = {
    "stderr closed": (f"{MERGE} 2>&-", 0, ""),
    "both closed": (f"{MERGE} >&- 2>&-", 0, ""),
    "all closed": (f"{MERGE} <&- >&- 2>&-", 0, ""),
    "stdout closed, an error": (f"{MISSING} >&-", 2, "nope: no such file"),
    "stderr closed, an error": (f"{MISSING} 2>&-", 2, ""),
    "stderr full": (f"{MERGE} 2>/dev/full", 0, ""),
    "stderr full, an error": (f"{MISSING} -v 2>/dev/full", 2, ""),
    "stdout full": ("targets base.safetensors >/dev/full", 2, "standard output: disk full"),
    "stdout full, an error": (f"{MISSING} --json >/dev/full", 2, "nope: no such file"),
    "stdout full, JSON": (f"{MERGE} --json >/dev/full", 1, "then: standard output: disk full"),
    "both full": ("targets base.safetensors --json >/dev/full 2>/dev/full", 2, ""),
    "help": ("targets --help >/dev/full", 2, "standard output, or a file: disk full"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("streams"), np.random.default_rng(0)
    save_file({"fc.weight": rng.standard_normal((6, 4)).astype("f4")}, folder / "base.safetensors")
    a, b = (rng.standard_normal(s).astype("f4") for s in ((2, 4), (6, 2)))
    save_adapter(Adapter({"fc.weight": LowRank(a, b, 3.0)}), folder / "peft")
    return folder


@pytest.mark.parametrize("row", ROWS)
def test_a_stream(folder: Path, row: str) -> None:
    line, code, say = ROWS[row]
    command = f"{sys.executable} -W ignore -m lora_fx.cli {line}"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert say in done.stderr and "Traceback" not in done.stderr
    told = [x for x in done.stderr.splitlines() if x.startswith("Error: ")]
    assert len(told) == (say != "")
    merged = (folder / "out.safetensors").exists()
    assert merged or not line.startswith(MERGE)


def test_a_file_does_not_get_the_number_of_a_closed_stream(folder: Path) -> None:
    """What a library of C writes to stderr would land in it."""
    code = (
        "import os; from lora_fx.cli.streams import open_streams; open_streams();"
        "fd = os.open('new', os.O_CREAT | os.O_WRONLY); os.write(2, b'log'); print(fd > 2)"
    )
    command = f'{sys.executable} -c "{code}" 2>&-'
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.stdout == "True\n" and (folder / "new").read_bytes() == b""


def test_a_full_disk_while_the_runtime_writes_an_adapter() -> None:
    tensors = {"a": np.ones((64, 64), "f4")}
    with pytest.raises(LoraFxError, match=r"^/dev/full: disk full\n"), explained("/dev/full"):
        write_file(Path("/dev/full"), tensors, {"adapter_version": 1, "model_version": 1})


@pytest.mark.parametrize("paths", [["a", "a"], ["a", "./a"], ["a", "b", "a"], ["x/../a", "a"],
                                   ["a.safetensors", "a.safetensors"]])  # fmt: skip
def test_an_adapter_twice_is_one_line(paths: list[str], tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="is given twice"):
        jobs_of([(path, 1.0) for path in paths], tmp_path)
    assert len(jobs_of([("a", 1.0), ("b/a", 1.0)], tmp_path)) == 2
