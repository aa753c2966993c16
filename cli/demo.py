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
    help="Folder for adapter/, model.onnx and report.json.",
)
@click.option("--quick", is_flag=True, help="A short run: few steps, no demand on the accuracy.")
@force_option
def command(output: str, quick: bool, force: bool) -> None:
    """Teach all-MiniLM-L6-v2 where in the standard library a docstring stands.

    The data are this machine's own Python files; nothing is downloaded. A linear probe is fitted,
    rank-8 adapters go on all linears, they are trained, folded and exported, and ONNX Runtime has
    to predict the same for every held-out example. Fails (exit 1) unless training gains 5 points
    over the probe; --quick (12 steps) only demands that the scores move.
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
