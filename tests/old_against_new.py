"""Compares pure functions with those of an older checkout, on drawn arguments.

    python -m tests.old_against_new OLD_CHECKOUT [--count 10000] [--only row_axis]

Every row of ROWS names a function and what draws its arguments. Both checkouts run it in a process
of their own, on the same arguments: those of input i are drawn from a generator whose seed is the
row's name and i. The results, or the errors, are compared as texts. A line a row says on how many
inputs they differ, how many different results there were, and how many inputs raised an error; the
first inputs that differ are shown. Exit code 1 if anything differs.

To add a row, write a function in tests/draws/ that takes a `random.Random` and returns the tuple
of positional arguments, and put it into ROWS. It is imported by both processes, so what it imports
of lora_fx has to be in both checkouts; `find` gets what has another name in one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.draws import onnx_file, row_axis

SHOWN = 3
"""Inputs of a row that are shown where they differ."""


@dataclass(frozen=True)
class Row:
    """One function of the product.

    Attributes:
        draw: Draws its positional arguments.
        names: Dotted names that it may have, where it was moved or renamed; a checkout takes the
            first that it has.
    """

    draw: Callable[[Random], tuple[Any, ...]]
    names: tuple[str, ...]


ROWS: Mapping[str, Row] = {
    "a stored tensor": Row(onnx_file.tensor, ("lora_fx.onnx.load._check",)),
    "nodes of functions": Row(onnx_file.functions, ("lora_fx.onnx.load._node_count",)),
    "rows of a node": Row(row_axis.node, ("lora_fx.onnx.row_axis._after",)),
    "rows of a Reshape": Row(row_axis.reshape, ("lora_fx.onnx.row_axis._after",)),
    "rows of a graph": Row(row_axis.graph, ("lora_fx.onnx.row_axis.provenance",)),
}


def find(*names: str) -> Any:
    """The first of some dotted names that this checkout has.

    Raises:
        LookupError: It has none of them.
    """
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
    raise LookupError(" or ".join(names))


def text_of(value: Any) -> str:
    """A result as a text; two results have one text where they are equal."""
    if isinstance(value, np.ndarray):
        digest = hashlib.sha1(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"{value.dtype}{list(value.shape)} {digest}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        texts = [f"{field.name}={text_of(getattr(value, field.name))}" for field in fields]
        return f"{type(value).__name__}({', '.join(texts)})"
    if isinstance(value, Mapping):
        texts = [f"{text_of(key)}: {text_of(item)}" for key, item in value.items()]
        return "{" + ", ".join(texts) + "}"
    if isinstance(value, Set):
        return "{" + ", ".join(sorted(map(text_of, value))) + "}"
    if isinstance(value, list | tuple | Iterator):
        return f"{type(value).__name__}({', '.join(map(text_of, value))})"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """What a call returns, or the error that it raises, as a text."""
    try:
        return text_of(function(*arguments))
    except Exception as error:
        hint = getattr(error, "hint", "")
        return f"raises {type(error).__name__}: {error} {hint}".rstrip()


def work(row: str, count: int) -> None:
    """Print the outcomes of a row, a line of JSON each; run with the code of one checkout."""
    function = find(*ROWS[row].names)
    for i in range(count):
        arguments = ROWS[row].draw(Random(f"{row} {i}"))
        print(json.dumps(outcome(function, arguments)))


def outcomes(checkout: Path, row: str, count: int) -> list[str]:
    """The outcomes of a row with the code of a checkout, in a process of its own."""
    tests = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        # Only `lora_fx` is the checkout's: `tests` is this one for both.
        (Path(folder) / "lora_fx").symlink_to(checkout.resolve() / "lora_fx")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((folder, str(tests))),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
        }
        run = partial(subprocess.check_output, env=environment, text=True)
        path = run([sys.executable, "-P", "-c", "import lora_fx; print(lora_fx.__file__)"])
        if not Path(path).is_relative_to(folder):
            raise SystemExit(f"{sys.executable} imports {path.strip()}, which is not {checkout}'s")
        command = [sys.executable, "-P", "-m", "tests.old_against_new", "--work", row]
        return run([*command, "--count", str(count)]).splitlines()


def compare(checkout: Path, row: str, count: int) -> int:
    """Print how the outcomes of a row differ; their number."""
    old_outcomes = outcomes(checkout, row, count)
    new_outcomes = outcomes(Path(__file__).parents[1], row, count)
    pairs = zip(old_outcomes, new_outcomes, strict=True)
    differing = [i for i, (before, after) in enumerate(pairs) if before != after]
    errors = sum(text.startswith('"raises ') for text in old_outcomes)
    print(
        f"{row}: {len(differing)} of {count} differ"
        f" ({len(set(old_outcomes))} different outcomes, {errors} errors)"
    )
    for i in differing[:SHOWN]:
        print(f"  input {i}")
        print(f"    - {json.loads(old_outcomes[i])}")
        print(f"    + {json.loads(new_outcomes[i])}")
    return len(differing)


def main() -> int:
    """Compares every row; 1 if one differs."""
    parser = argparse.ArgumentParser(description="Compares functions of two checkouts.")
    parser.add_argument("old", type=Path, nargs="?", help="The older checkout.")
    parser.add_argument("--count", type=int, default=10_000, help="Inputs of a row.")
    parser.add_argument("--only", default="", help="A part of the names of the rows to compare.")
    parser.add_argument("--work", help="Print the outcomes of this row.")
    options = parser.parse_args()
    if options.work:
        work(options.work, options.count)
        return 0
    if options.old is None:
        parser.error("name the older checkout")

    rows = [row for row in ROWS if options.only in f"{row} {' '.join(ROWS[row].names)}"]
    differing = [compare(options.old, row, options.count) for row in rows]
    return 1 if any(differing) else 0


if __name__ == "__main__":
    raise SystemExit(main())
