"""Every command that writes, with a disk that fails at one call of the system after the other.

    python -m tests.hostile.disk [--n N] [--seed S] [--only WORD ...]

A full disk at calls that write, and an error of input and output at any call. Each time inputs have
to be what they were, an output is whole or not there, nothing else is left, the error is one line
with a hint, and the next run succeeds. A line for each failure, then one JSON object of counts.
"""

from __future__ import annotations

import argparse
import errno
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.faults import CALLS, WRITES, Faults
from tests.hostile import child
from tests.hostile.kills import WRITERS, clear, split
from tests.hostile.mutate import make

KINDS = {"disk full": (errno.ENOSPC, WRITES), "I/O error": (errno.EIO, CALLS)}


def rounds(
    lines: dict[str, str], count: int, seed: int, folder: Path, kinds: Iterable[str] = KINDS
) -> Iterator[tuple[str, ...]]:
    """(class, command, fault, what) of each that failed; counts at the end."""
    make(folder)
    inputs = split(folder)[0]
    ended: Counter[str] = Counter()
    for name, line in lines.items():
        for kind in kinds:
            error, only = KINDS[kind]
            counted = child.command(line.split(), folder, seconds=120, faults=Faults(only=only))
            assert counted.code == 0 and counted.calls, f"{line}: {counted.err}"
            want = set(split(folder)[1])
            clear(folder)
            every = range(1, counted.calls + 1)
            rng = random.Random(f"{seed}/{name}/{kind}")
            for at in sorted(rng.sample(every, min(count, len(every)))):
                faults = Faults(at, error, only=only)
                got = child.command(line.split(), folder, seconds=120, faults=faults)
                ended[f"{kind}: {got.code}"] += 1
                now, outputs, left = split(folder)
                label = (name, f"{kind} at {at} of {counted.calls}")
                told = got.err.strip()[-300:]
                parts = "merge-all" in line or "--save-state" in line  # each whole by itself
                if now != inputs:
                    yield "input changed", *label
                if got.raw or (got.code == 2 and not got.refused):
                    yield "raw", *label, told
                if left:
                    yield "left", *label, str(left)
                if got.code == 2 and outputs and not parts:
                    yield "left", *label, f"{sorted(outputs)} {told}"
                whole = got.code == 0 or "was written" in got.err
                if whole and not parts and not want >= set(outputs) > set():
                    yield "wrong", *label, str(set(outputs) ^ want)
                clear(folder)
                done = child.command(line.split(), folder, seconds=120)
                if done.code or set(split(folder)[1]) != want or split(folder)[2]:
                    yield "rerun", *label, done.err[-300:]
                clear(folder)
    yield "counts", json.dumps(ended)


def main() -> None:
    """Run rounds, print what failed and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100_000, help="calls of each command and kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(WRITERS))
    given = parser.parse_args()
    child.prepare()
    lines = {n: x for n, x in WRITERS.items() if any(n.startswith(o) for o in given.only)}
    with tempfile.TemporaryDirectory() as folder:
        child.tell(rounds(lines, given.n, given.seed, Path(folder)), commands=len(lines))


if __name__ == "__main__":
    main()
