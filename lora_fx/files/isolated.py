"""Subprocesses of lora-fx, which import nothing from the current folder.

The current folder may hold somebody else's files, such as a click.py. Without -P Python imports
from it first, and even with -P an empty entry of PYTHONPATH means the current folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PYTHON = (sys.executable, "-P")
"""The start of a subprocess command: Python without the current folder in its import path."""


def environment() -> dict[str, str]:
    """Return the environment for a subprocess: PYTHONPATH without empty entries."""
    from importlib import metadata  # an import of 20 ms, which few need

    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    try:
        metadata.distribution("lora-fx")
    except metadata.PackageNotFoundError:  # a clone that is not installed
        places.append(str(Path(__file__).absolute().parents[2]))
    variables = {**os.environ, "PYTHONSAFEPATH": "1"}
    variables.pop("PYTHONPATH", None)
    if places:
        variables["PYTHONPATH"] = os.pathsep.join(places)
    return variables
