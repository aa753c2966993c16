"""The anonymous memory of this process, which no file backs, and its peak over a block."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.002
"""Seconds between two looks."""


@dataclass
class Grown:
    """How far the anonymous memory grew over a block, in bytes."""

    peak: int = 0


def anonymous() -> int:
    """Return the bytes of anonymous memory that are resident now (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def give_back() -> None:
    """Let the C library give memory that is free back to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def watched() -> Iterator[Grown]:
    """A block whose growth is measured, from its start to its highest point."""
    before = anonymous()
    grown = Grown()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY):
            grown.peak = max(grown.peak, anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield grown
    finally:
        ended.set()
        thread.join()
