"""Check random programs against W + s·BA computed by hand: `python -m tests.fuzz FIRST LAST`.

A seed from FIRST to LAST - 1 draws one program. Every failure is printed, and then the counts.
Groups of seeds run in separate processes, because ONNX Runtime ends the process on some programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.fuzz.check import check
from tests.fuzz.programs import program
from tests.fuzz.shrink import shrunk

SHARE = 25
"""The number of seeds that one process runs."""


def verdict_of(seed: int, onnx: bool, export: bool) -> dict[str, Any]:
    """The result of one seed."""
    if onnx:
        from tests.fuzz.check_graph import check_graph
        from tests.fuzz.graphs import graph

        return dataclasses.asdict(check_graph(graph(seed)))
    verbs = ("insert", "fold", "attach") + (("export",) if export else ())
    return dataclasses.asdict(check(program(seed), verbs))


def verdicts(first: int, last: int, options: list[str]) -> Iterator[dict[str, Any]]:
    """The results of all seeds; if a process ends, its current seed has failed."""
    while first < last:
        end = min(last, first + SHARE)
        words = [sys.executable, "-m", "tests.fuzz", str(first), str(end), "--lines", *options]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    verdict: dict[str, Any] = json.loads(line)
                    first = verdict["seed"] + 1
                    yield verdict
        if child.returncode:
            yield {"seed": first, "raw": [f"the process ends: {child.returncode}"]}
            first += 1


def main() -> None:
    """Run the seeds, and print the failures and the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("first", type=int, help="The first seed.")
    parser.add_argument("last", type=int, help="The seed at which to stop; it does not run.")
    parser.add_argument("--onnx", action="store_true", help="Draw ONNX graphs instead.")
    parser.add_argument("--no-export", action="store_true", help="Do not export to ONNX.")
    parser.add_argument(
        "--shrink", action="store_true", help="Also print a shorter program that still fails."
    )
    parser.add_argument("--lines", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.lines:
        importlib.import_module("tests.torchlib")
        for seed in range(given.first, given.last):
            print(json.dumps(verdict_of(seed, given.onnx, not given.no_export)), flush=True)
        return
    options = ["--onnx"] * given.onnx + ["--no-export"] * given.no_export
    counts: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    seeds: dict[str, int] = {}
    for v in verdicts(given.first, given.last, options):
        counts["all"] += 1
        for name in ("wrong", "raw", "unseen", "blind", "idle"):
            counts[name] += bool(v.get(name))
        counts.update(f"{verb} served" for verb in v.get("served", ()))
        counts.update(f"{verb} served in part" for verb in v.get("partly", ()))
        for verb, message in v.get("refused", {}).items():
            kind = f"{verb.partition(' at ')[0]}: {plain(message)}"
            classes[kind] += 1
            seeds.setdefault(kind, v["seed"])
        failed = {n: v[n][:2] for n in ("wrong", "raw", "unseen") if v.get(n)}
        if failed:
            print(f"--- seed {v['seed']}: {failed}", flush=True)
        if given.shrink and (v.get("wrong") or v.get("raw")):
            print(shrunk(v["seed"], given.onnx), flush=True)
    print("; ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    for kind, n in classes.most_common():
        print(f"{n:5} {kind} (seed {seeds[kind]})")


def plain(message: str) -> str:
    """A message in which names and numbers are replaced."""
    text = re.sub(r"'[^']*'|/\S+", "…", message)
    return re.sub(r"\d[\d.e+-]*", "#", text)[:160]


if __name__ == "__main__":
    main()
