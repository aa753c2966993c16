"""Files of the zoo that are as they were made: verify has to find every one of them right.

    python -m tests.probe.alarms make FOLDER [--drawn 30] [--seed 0] [MODEL...]
    python -m tests.probe.alarms check FOLDER [--provider webgpu] [--threads 1]

`make` writes drawn models of the zoo in all modes and precisions, and every other model in one
mode. `check` needs neither torch nor the models, so that it can run with another version of ONNX
Runtime; it prints a line for each file that is not right, and the counts, and ends with 1 if there
is one.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import lora_fx
from lora_fx.errors import LoraFxError

FORMS: tuple[dict[str, str], ...] = (
    {"mode": "merged"},
    {"mode": "switch"},
    {"mode": "switch", "target": "portable"},
    {"mode": "load"},
    {"mode": "batch"},
    {"mode": "merged", "precision": "float16"},
    {"mode": "merged", "precision": "int8"},
)
"""What is written of each drawn model."""


def forms(names: Sequence[str], drawn: int, seed: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Each model with the options of a file of it."""
    chosen = random.Random(seed).sample(list(names), min(drawn, len(names)))
    for name in chosen:
        for form in FORMS:
            yield name, form
    others = [name for name in names if name not in chosen]
    for number, name in enumerate(others):
        yield name, FORMS[number % 5]


def make(folder: Path, names: Sequence[str], drawn: int, seed: int) -> None:
    """Write the files, each in a folder of its own."""
    from tests.zoo import checks
    from tests.zoo.models import ZOO

    counts: Counter[str] = Counter()
    for name, form in forms(names or list(ZOO), drawn, seed):
        place = folder / "-".join((name, *form.values()))
        if place.exists():
            continue
        place.mkdir(parents=True)
        try:
            module = checks.perturbed(name).eval()
            adapter = module.adapter()
            given = {"one": adapter, "other": adapter.weighted(-0.5)}
            report = lora_fx.export(
                checks.built(name).cap,
                place / "m.onnx",
                adapters=adapter if form["mode"] == "merged" else given,
                provider="cpu",
                **form,
            )
        except LoraFxError as error:
            counts["refused"] += 1
            print(f"{place.name}: refused: {error.message[:150]}", flush=True)
            continue
        counts["written"] += 1
        for warning in report.warnings:
            if "probe" in warning:
                counts["with a note"] += 1
                print(f"{place.name}: {warning[:200]}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


def check(folder: Path, provider: str, threads: int) -> int:
    """Ask every file; return the number of those that are not right."""
    from lora_fx.passes.verbs.verify_probe import verify_probe

    verdicts: Counter[str] = Counter()
    wrong = 0
    for path in sorted(folder.glob("*/m.onnx")):
        try:
            report = verify_probe(path, provider=provider, threads=threads)
        except LoraFxError as error:
            reason = "no probe" if "no probe" in error.message else "refused"
            verdicts[reason] += 1
            print(f"{path.parent.name}: {reason}: {error.message[:200]}", flush=True)
            continue
        rows = report.details["verdicts"]
        verdicts.update(row["verdict"] for row in rows)
        if not report:
            wrong += 1
            for row in rows:
                if row["verdict"] != "right":
                    print(f"{path.parent.name}: {row['sentence'][:200]}", flush=True)
    import onnxruntime

    print(f"ONNX Runtime {onnxruntime.__version__}, {provider}, threads {threads}: {wrong} wrong")
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("make", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--drawn", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(argv)
    if options.command == "make":
        warnings.simplefilter("ignore")
        make(options.folder, options.models, options.drawn, options.seed)
        return 0
    return int(check(options.folder, options.provider, options.threads) > 0)


if __name__ == "__main__":
    sys.exit(main())
