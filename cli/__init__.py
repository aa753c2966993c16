"""The command line, one command in each file: it parses, calls the library and prints.

Nothing heavy is imported here, so that `lora-fx --help` is instant.
"""

from __future__ import annotations

import os
import sys


def _leave_current_folder() -> None:
    """Remove the current folder from the import path, unless the user put it there by name.

    `python -m` puts the current folder first, and an empty entry of PYTHONPATH, such as after a
    colon at its end, means the current folder. That folder may hold files of others, such as a
    click.py.
    """
    runs = any(word.endswith("lora_fx.cli") for word in sys.orig_argv)
    started = runs and sys.argv[:1] == ["-m"]  # while runpy looks for it
    if started and not sys.flags.safe_path:
        del sys.path[0]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if named != [""] and "" in named and not sys.flags.ignore_environment:
        folder = os.getcwd()
        if not any(os.path.abspath(place) == folder for place in named if place):
            sys.path[:] = [place for place in sys.path if place not in ("", folder)]


_leave_current_folder()

from lora_fx.cli.run import main  # noqa: E402 (imports click)

__all__ = ["main"]
