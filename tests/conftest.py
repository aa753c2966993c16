"""How the suite runs in parallel, and where tests write many small files."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.doctest import DoctestModule

# Two processes of one thread each use two cores better than one process of two. Before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests import it before lora_fx, too

# Tracing makes millions of small objects: by default a tenth of the time goes into looking for
# cycles among them, at 100,000 a twentieth.
gc.set_threshold(500_000, 20, 20)


MEMORY = Path("/dev/shm")
"""Files in memory, on Linux: thousands of fsyncs cost nothing there, and on a disk 5 ms each."""
ENOUGH = 6 << 30
"""Bytes that have to be free there for the folders of a run."""


@pytest.hookimpl(tryfirst=True)  # before folders of tests are made
def pytest_configure(config: pytest.Config) -> None:
    """Let the default run keep its files in memory, and torch keep no results of shapes.

    What torch keeps of an op costs as much as the op, and small models have few ops twice: without,
    a capture of one takes a quarter less. One of sixteen layers would take a tenth more.
    """
    if config.option.markexpr != "not slow":
        return
    os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ENOUGH:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process a core, of eight at most; none where one file or test is named, or with -s."""
    named = any("::" in arg or arg.endswith(".py") for arg in config.args)
    if named or config.option.capture == "no":
        return 0
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, 8)


def _one_thread() -> None:
    """Sessions of ONNX Runtime have one thread where nobody asks for a number.

    The runtime's threads spin after a run in wait for the next, on the core of another process:
    to open a tiny model and run it thrice took 2 to 4 ms on two cores, with one thread 0.4.
    """
    import onnxruntime

    opened = onnxruntime.InferenceSession.__init__

    def open_(self: Any, model: Any, sess_options: Any = None, *args: Any, **kwargs: Any) -> None:
        options = sess_options or onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.intra_op_num_threads or 1
        opened(self, model, options, *args, **kwargs)

    onnxruntime.InferenceSession.__init__ = open_


@pytest.hookimpl(tryfirst=True)  # before -m looks for marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give what `slow.txt` lists the mark `slow`.

    This runs where tests do. The process that hands them out collects none, and needs no torch.
    """
    if importlib.util.find_spec("torch"):
        importlib.import_module("tests.torchlib")
    if importlib.util.find_spec("onnxruntime"):  # tests/light.py runs tests without both
        _one_thread()
    lines = Path(__file__).with_name("slow.txt").read_text("utf-8").splitlines()
    slow = {line for line in lines if line and not line.startswith("#")}
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
    gc.collect()
    gc.freeze()  # what is imported stays: no collection of a test goes through it again


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """No example of a docstring stands in tests/, so none is looked for: the product's are."""
    return [c for c in (yield) if not isinstance(c, DoctestModule)]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one, in every run."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="lora-fx-test-") as folder:
        yield Path(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 20 MB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as e:
        pytest.skip(f"no mount: {e}")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
