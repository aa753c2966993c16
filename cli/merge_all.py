"""lora-fx merge-all: merge many adapters into one base, one checkpoint for each."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from lora_fx.cli.adapter_arguments import split_weight
from lora_fx.cli.blas import load_numpy
from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.merge_options import CheckpointOptions
from lora_fx.cli.options import force_option, option_group
from lora_fx.cli.output import emit, note, say
from lora_fx.errors import LoraFxError, NoEffectError, explained
from lora_fx.text import JsonView, table


def _shard(value: str) -> tuple[int, int]:
    shard, _, count = value.partition("/")
    if not (shard.isdigit() and count.isdigit()):
        raise LoraFxError(f"--shard {value!r}; expected i/n", "pass --shard 1/4, for example")
    return int(shard), int(count)


def _result(row: JsonView) -> str:
    if row.get("kept"):
        return "kept"
    if row["ok"]:
        return "merged"
    return "failed"


def _line(row: JsonView) -> str:
    """The progress line of a finished merge, with the error if it failed."""
    line = f"{row['adapter']}: {_result(row)}"
    if row["ok"]:
        return line
    return f"{line}: {row['error']} (Hint: {row['hint']})"


@click.command("merge-all", cls=ReportCommand)
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:W]...")
@click.option("-o", "--out", required=True, metavar="DIR", help="Name the folder of the outputs.")
@click.option("-j", "processes", type=int, default=1, help="Run this many merges at a time.")
@click.option(
    "--shard",
    default="1/1",
    show_default=False,
    metavar="i/n",
    help="Merge only this machine's part of the list, as I/N.",
)
@option_group("checkpoint", CheckpointOptions)
@force_option
def command(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    processes: int,
    shard: str,
    checkpoint: CheckpointOptions,
    force: bool,
) -> None:
    r"""Merge every ADAPTER into BASE by itself, as DIR/NAME.

    An adapter that cannot be merged does not stop the others; the exit code is then 1. Outputs
    that an earlier run of the same merge wrote are kept, so an interrupted run can be repeated.

    \b
    lora-fx merge-all ./llama adapters/* -o merged -j 4
    lora-fx merge-all ./llama adapters/* -o merged --shard $SLURM_ARRAY_TASK_ID/8
    """
    load_numpy()
    from lora_fx.checkpoint.merge_all import jobs_of, merge_all
    from lora_fx.files.checkpoint import open_checkpoint

    options = checkpoint.merge()
    # what no merge takes, and a base that cannot be read, is one error
    suffix = "" if open_checkpoint(base).path.is_dir() else ".safetensors"
    folder = Path(out)
    jobs = jobs_of(list(map(split_weight, adapters)), folder, _shard(shard), suffix)
    if not jobs:
        note(f"--shard {shard} is empty: there are {len(adapters)} adapters")
    if folder.exists() and not folder.is_dir():
        raise LoraFxError(f"{out} is not a folder", "choose another output")
    is_new = not folder.exists()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in merge_all(
        base, jobs, processes=processes, force=force, link=checkpoint.link, options=options
    ):
        rows.append(row)
        say(_line(row))
    place = {str(job.out): number for number, job in enumerate(jobs)}
    rows.sort(key=lambda row: place[row["out"]])  # they came as they finished
    failed = [row for row in rows if not row["ok"]]
    if is_new and rows and len(failed) == len(rows):
        with contextlib.suppress(OSError):  # a killed merge leaves files, and shards share it
            folder.rmdir()
    refused = None
    if failed:
        first = failed[0]
        refused = NoEffectError(
            f"{len(failed)} of {len(rows)} merges failed, the first {first['adapter']}: "
            f"{first['error']}",
            "read the reasons in the lines above; the other merges are done",
        )
    outputs = [row["out"] for row in rows if row["ok"]]
    inputs = [{"base": base, "adapters": list(adapters)}]
    text = ""
    if rows:
        lines: list[tuple[str, ...]] = [("adapter", "result", "output")]
        for row in rows:
            lines.append((row["adapter"], _result(row), row["out"] if row["ok"] else ""))
        text = "\n".join(table(lines))
    emit(text, inputs=inputs, outputs=outputs, merges=rows, refused=refused)
