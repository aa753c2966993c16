"""Processes that lora-fx starts, which import nothing from the current folder.

That may be a folder of somebody else's files, with a click.py in it. Without -P Python makes it the
first place of imports, and with -P an empty entry of PYTHONPATH still stands for it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PYTHON = (sys.executable, "-P")
"""The beginning of the command of such a process."""


def environment() -> dict[str, str]:
    """The variables of such a process: PYTHONPATH without empty entries."""
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
