"""The merge command loads numpy with one BLAS thread, unless the user said how many."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os
before = dict(os.environ)
from lora_fx.cli.blas import load_numpy
load_numpy()
assert dict(os.environ) == before
from threadpoolctl import threadpool_info
print(*{x["num_threads"] for x in threadpool_info() if x["internal_api"] == "openblas"})
"""


@pytest.mark.parametrize("said", [None, "2"])
def test_blas_threads(said: str | None) -> None:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    env = {k: v for k, v in os.environ.items() if k not in names}
    env |= {"OPENBLAS_NUM_THREADS": said} if said else {}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True
    )
    # Never more than there are cores; nothing where numpy has another BLAS.
    most = str(min(int(said or 1), os.cpu_count() or 1))
    assert done.stdout.split() in ([most], [])
