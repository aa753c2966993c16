"""What a runtime computes with a compiled .pt2 file, as JSON; run in the runtime's environment.

`python in_programs.py SAMPLE COMPILED FOLDER NAME [INPUT:ROWS]` opens COMPILED with the class of
the sample, once, compares each size and adapter with FOLDER/NAME.npz (switch_files.py), and
measures the swap. With INPUT:ROWS, ids beyond the rows of a table are tried too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

KINDS = ("base", "a", "b")
ROUNDS = 51
COPIES = 16
"""Adapters that are loaded to see what one takes."""
PAGE = 4096

Arrays = dict[str, Any]


def rel(ours: Any, expected: Any) -> float:
    """The largest max|a − b| / max|b|; infinite for another shape."""
    if ours.shape != expected.shape:
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - expected).max() / np.abs(expected).max())


def stored(path: Path) -> list[dict[str, list[Any] | Arrays]]:
    """The arrays of a file of switch_files.py: inputs by the program's names, outputs in order."""
    sizes: list[dict[str, Any]] = []
    with np.load(path) as arrays:
        for key in arrays:
            number, kind, tensor = key.split("/", 2)
            while len(sizes) <= int(number):
                sizes.append({"in": {}, **{of: [] for of in KINDS}})
            if kind == "in":
                name = tensor.replace(".", "_")
                sizes[int(number)]["in"][name] = torch.from_numpy(arrays[key])
            else:
                sizes[int(number)][kind].append(arrays[key])
    return sizes


def compared(model: Any, sizes: list[Any], adapters: Arrays) -> dict[str, float | str]:
    """The error of each size and kind, whatever ran before it; or the runtime's own words."""
    errors: dict[str, float | str] = {}
    for number, arrays in enumerate(sizes):
        for kind, adapter in adapters.items():
            try:
                outputs = model.run(arrays["in"], adapter)
            except RuntimeError as error:
                errors[f"{number}/{kind}"] = str(error).splitlines()[0]
                continue
            pairs = zip(outputs, arrays[kind], strict=True)
            errors[f"{number}/{kind}"] = max(rel(np.asarray(o), array) for o, array in pairs)
    return errors


def out_of_range(model: Any, arrays: Any, adapter: Any, name: str, rows: int) -> str:
    """What comes out for ids that the table has no row for, and whether the next run is right."""
    answers = set()
    for bad in (rows, -1):
        ids = arrays["in"][name].clone()
        ids[0, -1] = bad
        try:
            outputs = model.run({**arrays["in"], name: ids}, adapter)
        except RuntimeError:
            answers.add("error")
            continue
        is_nan = np.isnan(np.asarray(outputs[0])).all()
        answers.add("NaN" if is_nan else "numbers")
    again = np.asarray(model.run(arrays["in"], adapter)[0])
    assert rel(again, arrays["base"][0]) < 1e-5, "the run after it differs"
    return " and ".join(sorted(answers))


def figures(model: Any, inputs: Arrays, paths: dict[str, Path]) -> dict[str, float]:
    """Times in microseconds, medians of interleaved rounds, and bytes.

    An adapter is an argument of a run, so the swap is what a run with another adapter than the last
    one's takes more than a run with the same.
    """
    first, second = load_file(paths["a"]), load_file(paths["b"])
    target = {name: torch.empty_like(factor) for name, factor in second.items()}
    times: dict[str, list[float]] = {"copy": [], "run": [], "run_after_swap": []}

    def timed(what: str, call: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        call(*arguments)
        times[what].append((time.perf_counter() - start) * 1e6)

    def copy() -> None:
        for name, factor in second.items():
            target[name].copy_(factor)

    for _ in range(ROUNDS):
        model.run(inputs, first)
        timed("run_after_swap", model.run, inputs, second)
        timed("run", model.run, inputs, second)
        timed("copy", copy)

    before = resident()
    more = [load_file(paths["b"]) for _ in range(COPIES)]
    for adapter in more:
        model.run(inputs, adapter)
    taken = (resident() - before) / COPIES
    medians = {f"{what}_us": statistics.median(values) for what, values in times.items()}
    size = paths["b"].stat().st_size
    return {**medians, "second_adapter_bytes": taken, "adapter_file_bytes": size}


def resident() -> int:
    """The bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@contextlib.contextmanager
def stdout_for_json() -> Iterator[int]:
    """A copy of stdout, while what the runtime prints there goes to stderr."""
    ours = os.dup(1)
    os.dup2(2, 1)
    yield ours
    sys.stdout.flush()


def main(sample: str, compiled: str, folder: str, name: str, table: str = "") -> None:
    """Print what was measured."""
    torch.set_num_threads(1)
    with stdout_for_json() as ours:
        spec = importlib.util.spec_from_file_location("sample", sample)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        paths = {kind: Path(folder) / f"{name}.{kind}.safetensors" for kind in KINDS}
        sizes = stored(Path(folder) / f"{name}.npz")
        model = module.SwitchModel(compiled)
        adapters = {kind: load_file(path) for kind, path in paths.items()}
        result: dict[str, Any] = {"errors": compared(model, sizes, adapters)}
        result["figures"] = figures(model, sizes[0]["in"], paths)
        if table:
            input_name, rows = table.split(":")
            result["out_of_range"] = out_of_range(
                model, sizes[0], adapters["base"], input_name, int(rows)
            )
        os.write(ours, json.dumps(result).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
