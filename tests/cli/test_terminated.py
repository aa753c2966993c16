"""SIGTERM while a command writes: code 143, nothing left behind, inputs as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_fx import Adapter, LowRank, save_adapter
from lora_fx.cli.termination import stopping
from lora_fx.errors import Terminated
from tests.checkpoint.made import tree
from tests.cli.test_cli import MODEL

HOLD = """
import os, sys, time
import lora_fx.files.atomic as osfile

def hold(path):
    open(os.environ["LORA_FX_WRITING"], "a").write(f"{path}\\n")
    time.sleep(60)

def slowly(*paths, clean=osfile.discard):
    time.sleep(0.4)
    clean(*paths)

if os.environ.get("LORA_FX_WRITING"):
    osfile.sync, osfile.discard = hold, slowly
"""
"""sitecustomize of the command and its children: the last step before the name is given hangs."""
COMMANDS = {
    "merge": "merge base.safetensors adapter -o out.safetensors",
    "merge, a folder": "merge folder adapter -o out",
    "merge-all": "merge-all base.safetensors adapter adapter2 -o out -j 2",
    "extract": "extract base.safetensors tuned.safetensors -o out --rank 2",
    "truncate": "truncate adapter -o out --rank 1",
    "convert": "convert adapter -o out.safetensors --format kohya",
    "insert": "insert model.py:build -o out.pt2",
    "export": "export model.py:build -o out.onnx",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((12, 8)).astype("f4")
    save_file({"fc1.weight": weight}, tmp_path / "base.safetensors")
    (tmp_path / "folder").mkdir()
    save_file({"fc1.weight": weight}, tmp_path / "folder" / "model.safetensors")
    save_file({"fc1.weight": weight + np.float32(0.1)}, tmp_path / "tuned.safetensors")
    for name in ("adapter", "adapter2"):
        a, b = rng.standard_normal((2, 8)), rng.standard_normal((12, 2))
        low = LowRank(a.astype("f4"), b.astype("f4"), alpha=3.0)
        save_adapter(Adapter({"fc1.weight": low}), tmp_path / name)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def start(command: str, home: Path, site: Path) -> subprocess.Popen[str]:
    site.mkdir()
    (site / "sitecustomize.py").write_text(HOLD)
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-m", "lora_fx.cli", *command.split()],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{site}{os.pathsep}{root}",
            "LORA_FX_WRITING": str(site / "writing"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )


def until_it_writes(process: subprocess.Popen[str], marker: Path, count: int) -> None:
    for _ in range(600):
        if marker.exists() and len(marker.read_text().splitlines()) >= count:
            return
        if process.poll() is not None:
            pytest.fail("".join(process.communicate()))
        time.sleep(0.1)
    pytest.fail("it never came to write")


@pytest.mark.parametrize("case", COMMANDS)
def test_nothing_is_left(case: str, home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = tree(*sorted(home.iterdir()))
    site = tmp_path_factory.mktemp("site") / "site"
    process = start(COMMANDS[case], home, site)
    until_it_writes(process, site / "writing", 2 if case == "merge-all" else 1)
    where = home / "out" if case == "merge-all" else home
    assert list(where.glob(".*.tmp")), "temporaries are there while it writes"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # again, in the midst of the clean-up
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "terminated; nothing was left behind" in err and "Traceback" not in err
    left = {p for p in home.iterdir() if p != home / "out"} | {*home.glob("out/*")}
    assert tree(*sorted(left)) == before
    assert case == "merge-all" or not (home / "out").exists()


def test_the_handler_is_there_only_within_the_block() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(Terminated), stopping():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_handler_stays() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_other_threads_set_none() -> None:
    seen: list[object] = []

    def work() -> None:
        with stopping():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
