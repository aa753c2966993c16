"""Keeps BLAS to one thread in a merge, which has its own threads."""

from __future__ import annotations

import os
import sys


def load_numpy() -> None:
    """Import numpy with one BLAS thread, unless numpy is imported or the user set a number.

    A merge has threads of its own. BLAS's are started as it is loaded, and spin in wait for work:
    that is .1 s of a core on two cores.
    """
    name = "OPENBLAS_NUM_THREADS"
    if "numpy" in sys.modules or name in os.environ:
        return
    os.environ[name] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[name]
