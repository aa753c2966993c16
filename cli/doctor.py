"""lora-fx doctor: report everything that is wrong with a base and an adapter."""

from __future__ import annotations

import click

from lora_fx.cli.file_command import FileCommand
from lora_fx.cli.merge_options import CheckpointOptions
from lora_fx.cli.options import option_group
from lora_fx.cli.output import emit, note
from lora_fx.formats.servers import SERVERS


@click.command("doctor", cls=FileCommand)
@click.argument("base")
@click.argument("adapter")
@option_group("merge", CheckpointOptions)
@click.option(
    "--server",
    type=click.Choice([*SERVERS]),
    help="Also say what this server would read, misread, drop or refuse.",
)
def command(base: str, adapter: str, merge: CheckpointOptions, server: str | None) -> None:
    r"""Report every problem of a merge of ADAPTER into BASE, and what to do.

    BASE is a Hugging Face folder or a .safetensors file. No model is loaded or run. Give the
    options that you would give to lora-fx merge.

    Exit codes: 0 if the merge would work, 1 if it would not, 2 if a file cannot be read.

    \b
    lora-fx doctor ./llama ./adapter
    lora-fx doctor ./llama-awq ./adapter --dequantise
    lora-fx doctor ./mixtral ./adapter --server vllm
    """
    from lora_fx.checkpoint.doctor import examine, lines

    report = examine(base, adapter, merge.merge(), server)
    note(*report.warnings, warns=True)
    fields = {**report.to_json(), "inputs": [{"base": base, "adapter": adapter}]}
    del fields["parity"]
    emit(lines(report), **fields)
    click.get_current_context().exit(0 if report else 1)
