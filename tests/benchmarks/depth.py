"""CPU time of a verb as a model grows deeper, beside torch's own, and the line of its growth.

    python -m tests.benchmarks.depth [export capture ...] [--layers 4 8 16 32] [--rounds 1]

A random Llama of so many layers, with a free batch and length. A row is a line of ROWS. Of every
row the least CPU time of some rounds is printed for each depth, its ratio to the first row's, and
seconds = a + b·layers, by least squares: b is what a layer costs, and "off the line" is the largest
residual as a part of the time. CPU time of the process on one thread; all rows run in turn,
A B C A B C …. What is imported on first use is paid for by a model of one layer, which is not
counted.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lora_fx
from lora_fx.onnx.timing import interleave, timed
from tests.benchmarks.capture import FREE, LENGTH, WORDS, llama
from tests.benchmarks.interleave import processor
from tests.benchmarks.kept import Row, add_keep, report, rounded

Args = tuple[Any, ...]


def torch_onnx(model: nn.Module, args: Args, folder: Path, sizes: Any = FREE) -> object:
    """Export by torch alone."""
    out = folder / "torch.onnx"
    return torch.onnx.export(
        model, args, out, dynamo=True, dynamic_shapes=sizes, optimize=True, verbose=False
    )


def attach(model: nn.Module, args: Args, _: Path) -> object:
    """Attach, and leave the model as it was."""
    lora_fx.attach(model, args)
    return lora_fx.detach(model)


ROWS: dict[str, Callable[[nn.Module, Args, Path], object]] = {
    "torch.onnx.export": torch_onnx,
    "torch.onnx.export, fixed sizes": partial(torch_onnx, sizes=None),
    "torch.export": lambda m, args, _: torch.export.export(m, args, dynamic_shapes=FREE),
    "capture": lambda m, args, _: lora_fx.capture(m, args),
    "capture, repeat=False": lambda m, args, _: lora_fx.capture(m, args, repeat=False),
    "find": lambda m, args, _: lora_fx.find(m, args),
    "attach": attach,
    "insert": lambda m, args, _: lora_fx.insert(m, args),
    "export": lambda m, args, to: lora_fx.export(m, to / "m.onnx", args, force=True),
    "export, repeat=False": lambda m, args, to: lora_fx.export(
        m, to / "m.onnx", args, force=True, repeat=False
    ),
}
"""Name → what is timed, given a model in eval mode, its arguments, and a folder to write to."""


def line(layers: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, the largest |residual| as a part of the time) of seconds = a + b·layers."""
    b, a = np.polyfit(layers, seconds, 1)
    off = max(abs(a + b * n - s) / s for n, s in zip(layers, seconds, strict=True))
    return float(a), float(b), off


def table(layers: Sequence[int], times: Mapping[str, Sequence[float]]) -> list[Row]:
    """Seconds and ratios to the first row by depth, and the line."""
    base = next(iter(times.values()))
    rows: list[Row] = []
    for name, mine in times.items():
        row: Row = {"what": name}
        for depth, seconds, base_seconds in zip(layers, mine, base, strict=True):
            row[f"{depth} layers"] = rounded(seconds, 3)
            row[f"ratio at {depth}"] = rounded(seconds / base_seconds, 3)
        if len(layers) > 1:
            _, row["each layer"], row["off the line"] = map(rounded, line(layers, mine))
        rows.append(row)
    return rows


def least_times(
    depths: Sequence[int], rounds: int, jobs: Callable[[int], Mapping[str, Callable[[], object]]]
) -> dict[str, list[float]]:
    """Run the jobs of each depth in turn, and print and return the least CPU seconds by row.

    Args:
        depths: The numbers of layers. A depth of 1 runs first and is not counted.
        rounds: How often each job runs.
        jobs: Called with a number of layers; returns the row's name → what is timed.
    """
    shallow = jobs(1)
    interleave({row: partial(timed, job) for row, job in shallow.items()}, 1, warmup=0)
    times: dict[str, list[float]] = {row: [] for row in shallow}
    for layers in depths:
        runs = {row: partial(timed, job) for row, job in jobs(layers).items()}
        for row, samples in interleave(runs, rounds, warmup=0, before=gc.collect).items():
            times[row].append(min(sample.cpu for sample in samples))
            print(f"{layers:3} {row:32} {times[row][-1]:8.2f}", flush=True)
    return times


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of all depths, and what is known of it after each."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.depth")
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    add_keep(parser)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{processor()}, torch {torch.__version__}, {datetime.date.today()}")
    print(f"width {given.width}, the least of {given.rounds} rounds: seconds of CPU")
    args = (torch.randint(0, WORDS, (2, LENGTH)),)
    rows = given.rows or list(ROWS)
    with tempfile.TemporaryDirectory() as name:

        def jobs(layers: int) -> dict[str, Callable[[], object]]:
            model = llama(layers, given.width)
            return {row: partial(ROWS[row], model, args, Path(name)) for row in rows}

        rows_by_depth = table(given.layers, least_times(given.layers, given.rounds, jobs))
        report("depth", "CPU seconds", rows_by_depth, given.keep)


if __name__ == "__main__":
    main()
