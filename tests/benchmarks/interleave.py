"""Whole commands timed in turn, A B C A B C …, and compared with a baseline of the same run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_fx.onnx.timing import Sample
from tests.benchmarks.kept import Row, cores, figures
from tests.processors import family


@dataclass(frozen=True)
class Run(Sample):
    """One run of a command: seconds by the clock, seconds of CPU, peak resident MB."""

    rss: float


def run(argv: Sequence[str]) -> Run:
    """Run a command to its end; its output is thrown away, an exit code is an error."""
    # An installed package has its bytecode; ours is written in the round that is not counted.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(argv)}: exit {child.returncode}")
    peak = usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return Run(wall, usage.ru_utime + usage.ru_stime, peak)


def rows(found: Mapping[str, Sequence[Run]]) -> list[Row]:
    """Medians and minima of wall and CPU seconds, and ratios to the first command's.

    `ratio` and `min ratio` are those of the clock.
    """
    base = next(iter(found.values()))
    made: list[Row] = []
    for name, runs in found.items():
        cpu = figures(name, [run.cpu for run in runs], [run.cpu for run in base])
        wall = figures(name, [run.wall for run in runs], [run.wall for run in base])
        in_cpu = {f"CPU {figure}": value for figure, value in cpu.items() if figure != "what"}
        made.append({**wall, **in_cpu, "peak MB": round(max(run.rss for run in runs))})
    return made


def processor() -> str:
    """The family of the processor, and how many cores this process may use."""
    return f"{family()}, {cores()} cores"
