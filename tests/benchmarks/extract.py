"""Randomised SVD of one weight's difference against numpy's full SVD, interleaved.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.extract [--side 2048] [--rank 16] [--rounds 7]

The spectrum is σₖ ∝ 1/k of 256 components with 30 % of white noise. Every round runs full, sampled
and sampled again (the A/A control); what is compared are ratios within a round, so that a machine
that slows down slows all three. The error is that of rank r relative to the optimum.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lora_fx.adapter.svd import leading
from lora_fx.dtypes import Array
from lora_fx.inputs import generator
from tests.benchmarks.kept import add_keep, figures, report


def spectrum(side: int, noise: float = 0.3) -> Array:
    rng = np.random.default_rng(0)
    k = min(256, side)
    u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for _ in range(2))
    signal = (u / np.arange(1, k + 1)) @ v.T
    white = rng.standard_normal((side, side))
    white *= noise * np.linalg.norm(signal) / np.linalg.norm(white)
    return np.asarray((signal + white).astype(np.float32))


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    add_keep(parser)
    options = parser.parse_args()
    delta, k = spectrum(options.side), options.rank

    def sampled() -> Any:
        return leading(delta, k, generator("benchmark", 0))

    def full() -> Any:
        return np.linalg.svd(delta, full_matrices=False)

    sampled()
    times: dict[str, list[float]] = {"full": [], "sampled": [], "again": []}
    for _ in range(options.rounds):
        seconds, (_, s, _) = timed(full)
        times["full"].append(seconds)
        for name in ("sampled", "again"):
            seconds, (u, values, vt) = timed(sampled)
            times[name].append(seconds)
    best = float(np.linalg.norm(s[k:]))
    got = float(np.linalg.norm(delta - (u * values) @ vt))
    rows = [figures(name, seconds, times["full"]) for name, seconds in times.items()]
    what = f"{options.side}², rank {k}: CPU seconds of an SVD"
    report("extract", what, rows, options.keep)
    print(f"error over the optimum: {got / best - 1:+.4%}")


if __name__ == "__main__":
    main()
