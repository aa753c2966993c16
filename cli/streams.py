"""The standard streams of the process."""

from __future__ import annotations

import contextlib
import os
import sys


def open_streams() -> None:
    """Open closed standard streams (after `2>&-`, for example) on the null device.

    Python sets a closed stream to None, and libraries fail when they print to it. And the next file
    to be opened would get the stream's number, so that a C library would write its stderr into it.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    with contextlib.suppress(OSError):  # a machine without a null device keeps them closed
        descriptor = os.open(os.devnull, os.O_RDWR)
        while descriptor <= 2:
            descriptor = os.dup(descriptor)
        os.close(descriptor)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
