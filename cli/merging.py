"""Options that merge and merge-all share, and the arguments that pass them on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click

DTYPE = click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32", "float64"]),
    help="Of touched tensors.  [default: as stored]",
)
FLAGS = {
    "allow-unused": "Leave out updates that the base has no tensor for.",
    "allow-missing": "Accept an adapter that lacks layers its config has.",
    "any-base": "Merge into other weights than it was trained on.",
    "untie": "Give a tied output head a tensor of its own.",
    "add": "Add whole tensors that the base lacks: a new head.",
    "again": "Merge an adapter that is in the base already.",
    "link": "Hard links for untouched files, instead of copies.",
    "trust": "Read an adapter_model.bin, by torch's unpickler that runs no code.",
}


def merge_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that merges."""
    for name, text in reversed(FLAGS.items()):
        function = click.option(f"--{name}", is_flag=True, help=text)(function)
    return DTYPE(function)


def arguments(options: Mapping[str, Any]) -> list[str]:
    """The command line that says these options."""
    given = [f"--{name}" for name in FLAGS if options[name.replace("-", "_")]]
    return [*given, "--dtype", options["dtype"]] if options["dtype"] else given


def load_numpy() -> None:
    """Import numpy with one BLAS thread, where nothing has imported it or said how many.

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
