"""What OpenVINO computes with a folder of switch files, as JSON; run in its own environment.

`python in_openvino.py SAMPLE FOLDER [NAME=ROWS]…` opens every NAME.onnx of the folder with the
class of the sample, once, and compares each size and adapter with NAME.npz (switch_files.py). For a
NAME=ROWS, an id beyond the rows of its table is tried too, and the swap is measured.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

KINDS = ("base", "a", "b")
ROUNDS = 101
COPIES = 16
"""Adapters that are loaded to see what one takes."""
PAGE = 4096

Arrays = dict[str, Any]


def rel(ours: Any, expected: Any) -> float:
    """The largest max|a − b| / max|b|; infinite for another shape."""
    if ours.shape != expected.shape:
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - expected).max() / np.abs(expected).max())


def stored(path: Path) -> list[dict[str, Arrays]]:
    """The arrays of a file of switch_files.py, for each size by kind and name."""
    sizes: list[dict[str, Arrays]] = []
    with np.load(path) as arrays:
        for key in arrays:
            number, kind, tensor = key.split("/", 2)
            while len(sizes) <= int(number):
                sizes.append({})
            sizes[int(number)].setdefault(kind, {})[tensor] = arrays[key]
    return sizes


def compared(switch: Any, sizes: list[dict[str, Arrays]], adapters: Arrays) -> dict[str, float]:
    """The error of each size and kind, whatever ran before it."""
    errors = {}
    for number, arrays in enumerate(sizes):
        for kind, adapter in adapters.items():
            switch.use(adapter)
            outputs = switch.run(arrays["in"])
            of_outputs = [rel(outputs[name], array) for name, array in arrays[kind].items()]
            errors[f"{number}/{kind}"] = max(of_outputs)
    return errors


def out_of_range(switch: Any, inputs: Arrays, name: str, rows: int) -> str:
    """What comes out for ids that the table has no row for."""
    answers = set()
    for bad in (rows, -1):
        ids = inputs[name].copy()
        ids[0, -1] = bad
        outputs = switch.run({**inputs, name: ids})
        first = next(iter(outputs.values()))
        answers.add("NaN" if np.isnan(first).all() else "numbers")
    return " and ".join(sorted(answers))


def figures(switch: Any, inputs: Arrays, paths: dict[str, Path]) -> dict[str, float]:
    """Times in microseconds, medians of interleaved rounds, and bytes."""
    first, second = switch.load(paths["a"]), switch.load(paths["b"])
    source = [tensor.data for _, tensor in second]
    target = [np.empty_like(array) for array in source]
    times: dict[str, list[float]] = {"swap": [], "copy": [], "run": [], "run_after_swap": []}

    def timed(what: str, call: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        call(*arguments)
        times[what].append((time.perf_counter() - start) * 1e6)

    def copy() -> None:
        for ours, array in zip(target, source, strict=True):
            np.copyto(ours, array)

    for _ in range(ROUNDS):
        switch.use(first)
        switch.run(inputs)
        timed("run", switch.run, inputs)
        timed("copy", copy)
        timed("swap", switch.use, second)
        timed("run_after_swap", switch.run, inputs)

    before = resident()
    more = [switch.load(paths["b"]) for _ in range(COPIES)]
    for adapter in more:
        switch.use(adapter)
        switch.run(inputs)
    taken = (resident() - before) / COPIES
    medians = {f"{what}_us": statistics.median(values) for what, values in times.items()}
    size = paths["b"].stat().st_size
    return {**medians, "second_adapter_bytes": taken, "adapter_file_bytes": size}


def resident() -> int:
    """The bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def main(sample: str, folder: str, *tables: str) -> None:
    """Print what was measured, by the names of the files."""
    spec = importlib.util.spec_from_file_location("sample", sample)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    results: dict[str, Any] = {"version": ov.__version__}
    measured = dict(table.split("=") for table in tables)
    for path in sorted(Path(folder).glob("*.onnx")):
        name = path.stem
        paths = {kind: path.with_name(f"{name}.{kind}.safetensors") for kind in KINDS}
        sizes = stored(path.with_suffix(".npz"))
        try:
            switch = module.SwitchModel(path)
            adapters = {kind: switch.load(of_kind) for kind, of_kind in paths.items()}
            results[name] = {"errors": compared(switch, sizes, adapters)}
        except RuntimeError as error:
            results[name] = {"refused": str(error)}
            continue
        if name in measured:
            inputs = sizes[0]["in"]
            results[name]["figures"] = figures(switch, inputs, paths)
            switch.use(adapters["base"])
            if measured[name]:
                input_name, rows = measured[name].split(":")
                answer = out_of_range(switch, inputs, input_name, int(rows))
                results[name]["out_of_range"] = answer
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
