"""Keeps BLAS to one thread in a merge, which has its own threads."""

from __future__ import annotations

import os
import sys


def load_numpy() -> None:
    """Import numpy with one BLAS thread, unless numpy is imported or the user set a number.

    A merge has its own threads. BLAS starts its threads when it is loaded, and they spin while they
    wait for work: on two cores that costs .1 s of one core.
    """
    name = "OPENBLAS_NUM_THREADS"
    if "numpy" in sys.modules or name in os.environ:
        return
    os.environ[name] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[name]
