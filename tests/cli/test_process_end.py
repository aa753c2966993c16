"""A command's process ends without a collection of all its libraries, and leaves nothing undone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MODEL = """
import atexit
import gc
import os
import tempfile

import torch
from torch import nn


class Net(nn.Linear):
    log = open("log.txt", "w")  # never closed, and in a cycle: a class is one
    notes = open("notes.bin", "wb", buffering=1 << 16)
    folder = tempfile.TemporaryDirectory(dir=".")


def at_exit():
    Net.log.write(" at exit")


def visited(phase, info):
    if phase == "start" and ending and info["generation"] == 2:
        print("visited", len(gc.get_objects()), flush=True)


ending = []
atexit.register(at_exit)
atexit.register(ending.append, True)
gc.callbacks.append(visited)


def factory():
    Net.log.write("made")
    Net.notes.write(b"made")
    return Net(4, 3), (torch.randn(2, 4),)
"""


def test_the_end_visits_no_objects_and_flushes_files(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    command = [sys.executable, "-m", "lora_fx.cli", "-q", "targets", "net.py:factory"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    collections = [line.split() for line in run.stdout.splitlines() if "visited" in line]
    assert collections, "Python collects at its end"
    assert all(int(count) == 0 for _, count in collections)
    assert (tmp_path / "log.txt").read_text() == "made at exit"
    assert (tmp_path / "notes.bin").read_bytes() == b"made"
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"net.py", "log.txt", "notes.bin"}
