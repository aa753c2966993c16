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
    help="Also say what this program would read, misread, drop or refuse.",
)
def command(base: str, adapter: str, merge: CheckpointOptions, server: str | None) -> None:
    r"""Say everything that is wrong with the pair BASE and ADAPTER, and what to do.

    BASE is a Hugging Face folder or a .safetensors file. Nothing is loaded or run. The options are
    those of the merge that is meant.

    Exit code 0: nothing that makes the pair wrong. 1: errors were found. 2: a file cannot be read.

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
