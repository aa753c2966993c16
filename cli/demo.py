"""lora-fx demo: insert, train and export a real model on real data."""

from __future__ import annotations

import os
from pathlib import Path

import click

from lora_fx.cli.file_command import FileCommand
from lora_fx.cli.options import force_option
from lora_fx.cli.output import emit, note, say


@click.command("demo", cls=FileCommand)
@click.option(
    "-o",
    "--output",
    default="lora-fx-demo",
    metavar="OUT",
    help="Name the folder for adapter/, model.onnx and report.json.",
)
@click.option("--quick", is_flag=True, help="Train a few steps only, and demand no accuracy.")
@force_option
def command(output: str, quick: bool, force: bool) -> None:
    """Train an adapter for all-MiniLM-L6-v2 on docstrings of the standard library, and export it.

    The model learns which part of the library a docstring is from. The data are this machine's
    own Python files; nothing is downloaded. The command fits a linear probe, trains rank-8 adapters
    on all linear layers, folds and exports them, and checks that ONNX Runtime predicts the same
    for every held-out example. The exit code is 1 if training gains less than 5 points over the
    probe. --quick (12 steps) only checks that the scores change.
    """
    # Threads spin shortly, then sleep: nothing lost on idle cores, half the time on shared ones.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from lora_fx.cli.demo_stages import Size, refusal, run, table
    from lora_fx.files.atomic import replacing

    if quick:
        note("--quick: the accuracy after training is printed, not demanded")
    with replacing(output, force=force) as out:
        out.mkdir()
        result = run(out, Size.of(quick), say)
    emit(
        table(result, Path(output)), refused=refusal(result),
        outputs=[output], facts=result.facts, seconds=result.seconds, failures=result.failures,
    )  # fmt: skip
