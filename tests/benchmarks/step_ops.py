"""Where the time of a training step goes, by op: in ONNX Runtime and in torch.

    python -m tests.benchmarks.step_ops [bert gpt2] [--steps 12] [--keep quiet]

The steps are those of tests.benchmarks.step, on one thread. ONNX Runtime's own profile gives the
time of each node, and torch's profiler that of each op without the ops that it calls. Of each node
or op the least time over the steps counts, so that other jobs disturb little. Products are told
apart by their size: those with weights of the model do nearly all arithmetic, those of the branches
have a rank of 8 on one side. GFLOP/s is what the large ones reach.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from lora_fx.onnx import TrainSession
from lora_fx.onnx.runtime_log import quiet_options
from tests.benchmarks.interleave import processor
from tests.benchmarks.kept import Row, add_keep, report, rounded
from tests.benchmarks.step import LR, SIZES, batch, build, example, in_torch

PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "aten::mm", "aten::addmm", "aten::bmm")
LARGE = 1 << 28
"""FLOPs of a product from which on it is one with a weight of the model."""
Spent = tuple[str, int, float]
"""Op, FLOPs of a product or 0, and milliseconds."""


def flops(shapes: Sequence[Sequence[int]]) -> int:
    """2·m·n·k of a product, by the shapes of its operands; 0 where there are no two matrices."""
    matrices = [shape for shape in shapes if len(shape) > 1]
    if len(matrices) < 2:
        return 0
    first, second = matrices[:2]
    shared = next((side for side in first[-2:][::-1] if side in second[-2:]), 0)
    if not shared:
        return 0
    batch = math.prod(second[:-2])
    return 2 * math.prod(first) * math.prod(second) // shared // batch


def onnx_profile(name: str, file: str, steps: int) -> list[Spent]:
    """The least time of each node."""

    def profiled() -> Any:
        options = quiet_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(file).with_suffix(""))
        return options

    with mock.patch("lora_fx.onnx.session.quiet_options", profiled):
        training = TrainSession(file, LR, "cpu", 1)
    for _ in range(steps):
        training.step(batch(name, SIZES[name]))
    events = json.loads(Path(training.session.end_profiling()).read_text())
    least: dict[str, Spent] = {}
    for event in events:
        if not event["name"].endswith("_kernel_time"):
            continue
        op = event["args"]["op_name"]
        read, made = (_shapes(event["args"][f"{side}_type_shape"]) for side in ("input", "output"))
        size = 0
        if op in PRODUCTS:
            size = (
                flops(read) or 2 * math.prod(made[0]) * read[0][-1]
            )  # packed weights lack a shape
        earlier = least.get(event["name"], (op, size, math.inf))
        least[event["name"]] = (op, size, min(earlier[2], event["dur"] / 1000))
    return list(least.values())


def _shapes(typed: Sequence[Mapping[str, list[int]]]) -> list[list[int]]:
    """The shapes of values that a profile gives by their types."""
    return [shape for value in typed for shape in value.values()]


def torch_profile(name: str, file: str, steps: int) -> list[Spent]:
    """The least time of each call of an op, in the order of the step."""
    from torch.profiler import ProfilerActivity, profile

    step = in_torch(name, file)
    step()
    runs: list[list[Spent]] = []
    for _ in range(steps):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            step()
        events = sorted(profiler.events(), key=lambda e: (e.time_range.start, -e.time_range.end))
        run: list[Spent] = []
        for event in events:
            # the first operand of addmm is a term of the sum
            operands = event.input_shapes[event.key == "aten::addmm" :]
            size = flops(operands) if event.key in PRODUCTS else 0
            run.append((event.key, size, event.self_cpu_time_total / 1000))
        runs.append(run)
    runs = [run for run in runs if [e[:2] for e in run] == [e[:2] for e in runs[-1]]]
    return [(*calls[0][:2], min(call[2] for call in calls)) for calls in zip(*runs, strict=True)]


def by_op(spent: Sequence[Spent]) -> list[Row]:
    """Milliseconds and shares by op, the longest first, with the rate of the large products."""
    milliseconds: dict[str, float] = defaultdict(float)
    sizes: dict[str, int] = defaultdict(int)
    for op, size, took in spent:
        label = op
        if op in PRODUCTS:
            label = f"{op}, {'with weights' if size >= LARGE else 'small'}"
        milliseconds[label] += took
        sizes[label] += size
    total = sum(milliseconds.values())
    rows: list[Row] = [{"what": "all", "ms": rounded(total), "share": 1.0}]
    for label in sorted(milliseconds, key=lambda label: -milliseconds[label]):
        took = milliseconds[label]
        row: Row = {"what": label, "ms": rounded(took, 3), "share": rounded(took / total, 2)}
        if "with weights" in label:
            row["GFLOP/s"] = rounded(sizes[label] / took / 1e6, 3)
        rows.append(row)
    return [row for row in rows if row["share"] >= 0.01]


PROFILES: Mapping[str, Callable[[str, str, int], list[Spent]]] = {
    "ONNX Runtime": onnx_profile,
    "torch": torch_profile,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table for each model and side."""
    import torch

    import lora_fx

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.step_ops")
    parser.add_argument("models", nargs="*", default=list(SIZES))
    parser.add_argument("--steps", type=int, default=12)
    add_keep(parser)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(processor())
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            file = os.path.join(folder, f"{name}.onnx")
            lora_fx.export(build(name), file, (), example(name), mode="train", provider="cpu")
            for side, profile in PROFILES.items():
                rows = by_op(profile(name, file, given.steps))
                report("step_ops", f"{name}, {side}: time by op", rows, given.keep)


if __name__ == "__main__":
    main()
