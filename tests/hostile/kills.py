"""Every command that writes, ended at random times by SIGKILL, SIGTERM and SIGINT.

    python -m tests.hostile.kills [--n N] [--seed S] [--only WORD ...]

After each end, inputs have to be what they were, and an output is whole or not there. After SIGTERM
and SIGINT nothing else may be left; what SIGKILL leaves, the next run has to take away. That run
must succeed, with the same files. A line for each failure, then one JSON object of counts.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.hostile import child
from tests.hostile.mutate import digest, make

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WRITERS = {
    "merge a folder": "merge sharded peft -o out",
    "merge a file": "merge base.safetensors peft -o out.safetensors",
    "merge .onnx": "merge graph.onnx peft -o out.onnx",
    "merge with data": "merge apart.onnx peft -o out.onnx",
    "merge-all": "merge-all sharded peft kohya.safetensors -o out -j 2",
    "export merged": "export graph.onnx peft -o out.onnx",
    "export switch": "export graph.onnx peft -o out.onnx --mode switch",
    "export load": "export graph.onnx peft -o out.onnx --mode load",
    "export batch": "export graph.onnx peft -o out.onnx --mode batch",
    "export to Triton": "export graph.onnx peft -o out.onnx --triton out",
    "insert .onnx": "insert graph.onnx -o out.onnx -r 2",
    "insert .pt2": "insert net.py:build -o out.pt2 -r 2",
    "train": "train net.py:build data.npz -o out -r 2 --steps 3 --save-state out.s --validation 0",
    "plan": "plan net.py:build -o out.json",
    "convert": "convert peft -o out.safetensors --format kohya",
    "extract": "extract merged.safetensors base.safetensors -o out --rank 2",
    "truncate": "truncate peft -o out --rank 1",
    "a page": "merge base.safetensors peft -o out.safetensors --report out.html",
}
OUTPUTS = ("out", "peft.onnx_adapter")
"""How names of outputs begin."""


def clear(folder: Path) -> None:
    """Take outputs away."""
    for path in folder.iterdir():
        if path.name.startswith(OUTPUTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def split(folder: Path) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Inputs, outputs, and names of what is neither."""
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    left = []
    for name, value in digest(folder).items():
        if any(part.startswith(".") for part in Path(name).parts):
            left.append(name)
        else:
            (outputs if name.startswith(OUTPUTS) else inputs)[name] = value
    left += [p.name for p in folder.iterdir() if p.name.startswith(".") and p.is_dir()]
    return inputs, outputs, left


def rounds(lines: dict[str, str], count: int, seed: int, folder: Path) -> Iterator[tuple[str, ...]]:
    """(class, command, signal, what) of each that failed; counts at the end."""
    make(folder)
    inputs = split(folder)[0]
    ended: Counter[str] = Counter()
    for name, line in lines.items():
        rng = random.Random(f"{seed}/{name}")
        first = child.command(line.split(), folder, seconds=120)
        assert first.code == 0, f"{line}: {first.err}"
        _, want, _ = split(folder)
        clear(folder)
        again = child.command(line.split(), folder, seconds=120)
        same = split(folder)[1] == want  # files with a time in them differ from run to run
        clear(folder)
        for number in (s for s in SIGNALS for _ in range(count)):
            after = rng.uniform(0.0, 1.1 * min(first.seconds, again.seconds))
            got = child.command(line.split(), folder, seconds=120, stop=(after, number))
            ended[f"{number.name} {got.code}"] += 1
            now, outputs, left = split(folder)
            label = (name, number.name, f"after {after:.3f} s")
            if now != inputs:
                yield "input changed", *label
            if number is not signal.SIGKILL and left:
                yield "left", *label, str(left)
            # by its own number: it came when the command had ended, and Python had not
            stopped = number is not signal.SIGKILL and got.code not in (0, -number)
            parts = "merge-all" in line or "--save-state" in line  # each whole by itself
            if stopped and outputs and not parts and "was written" not in got.err:
                yield "left", *label, f"{sorted(outputs)} {got.err[-200:]}"
            if same and any(
                want.get(n) != h for n, h in outputs.items() if not n.startswith("out.s/")
            ):
                yield "wrong", *label, str(sorted(outputs))
            force = bool(outputs) and "merge-all" not in line
            argv = [*line.split(), *(["--force"] if force else [])]
            done = child.command(argv, folder, seconds=120)
            now, outputs, left = split(folder)
            if done.code:
                yield "rerun refused", *label, done.err[-300:]
            elif left:
                yield "left after the rerun", *label, str(left)
            elif same and set(outputs) != set(want) and not force:  # which may write beside it
                yield "wrong after the rerun", *label, str(set(outputs) ^ set(want))
            clear(folder)
            for path in folder.glob(".*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    yield "counts", json.dumps(ended)


def main() -> None:
    """Run rounds, print what failed and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=15, help="of each signal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(WRITERS))
    given = parser.parse_args()
    child.prepare()
    lines = {n: x for n, x in WRITERS.items() if any(n.startswith(o) for o in given.only)}
    with tempfile.TemporaryDirectory() as folder:
        child.tell(rounds(lines, given.n, given.seed, Path(folder)), commands=len(lines))


if __name__ == "__main__":
    main()
