"""Whole commands timed in turn, A B C A B C …, and compared with a baseline of the same run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_fx.onnx.timing import Sample


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


def show(found: Mapping[str, Sequence[Run]]) -> str:
    """Medians and minima, and their ratios to the first command's."""
    base = next(iter(found.values()))
    lines = [
        f"{'':28} {'wall med':>9} {'min':>7} {'ratio':>6} {'min r':>6}   "
        f"{'cpu med':>8} {'min':>7} {'ratio':>6} {'min r':>6}   {'peak MB':>8}"
    ]
    for name, runs in found.items():
        row = f"{name:28}"
        for pick in ("wall", "cpu"):
            mine = [getattr(r, pick) for r in runs]
            theirs = [getattr(r, pick) for r in base]
            middle, low = statistics.median(mine), min(mine)
            row += (
                f" {middle:9.3f} {low:7.3f} {middle / statistics.median(theirs):6.2f}"
                f" {low / min(theirs):6.2f}  "
            )
        lines.append(f"{row} {max(r.rss for r in runs):8.0f}")
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, and how many of it this process may use."""
    name = ""
    try:
        with open("/proc/cpuinfo") as f:
            name = next((x.split(":")[1].strip() for x in f if x.startswith("model name")), "")
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name or 'unknown processor'}, {cores} cores"
