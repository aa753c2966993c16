"""lora-fx bench: time .onnx files in turn; the first one runs twice, as a control."""

from __future__ import annotations

import click

from lora_fx.cli.data_arguments import load_npz
from lora_fx.cli.file_command import FileCommand
from lora_fx.cli.options import THREADS, Rules
from lora_fx.cli.output import emit
from lora_fx.errors import NoSay
from lora_fx.text import Json

NO_SAY: Rules = (
    NoSay(
        ("sizes",), lambda asked: bool(asked["inputs_file"]),
        "with --inputs {0[inputs_file]}, which has one size", "leave one of them out",
    ),
)  # fmt: skip


@click.command("bench", cls=FileCommand, no_say=NO_SAY)
@click.argument("files", nargs=-1, required=True, metavar="A.onnx [B.onnx]...")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="BATCH,LENGTH",
    help="Set the dynamic dimensions; may be given several times.  [default: 1,8 and 1,32]",
)
@click.option(
    "--inputs", "inputs_file", metavar="FILE.npz", help="Read inputs of one size from this file."
)
@click.option("--rounds", type=int, default=15, help="Time this many rounds.")
@click.option(
    "--threads", type=THREADS, default=1, help="Set the number of threads of ONNX Runtime."
)
@click.option("--provider", default="cpu", help="Run ONNX Runtime on auto, cpu, cuda or webgpu.")
def command(
    files: tuple[str, ...],
    sizes: tuple[str, ...],
    inputs_file: str | None,
    rounds: int,
    threads: int,
    provider: str,
) -> None:
    r"""Time ONNX files in turn, and print the latency of each and its ratio to that of A.

    A is timed twice: the second row shows how much two measurements of the same file differ.

    \b
    lora-fx bench base.onnx adapted.onnx --size 1,128 --size 8,128
    """
    from lora_fx.onnx.bench import SIZES, bench
    from lora_fx.onnx.on_device import of_files
    from lora_fx.onnx.session import usable_provider

    timings = bench(
        files,
        sizes=[_size(text) for text in sizes] or SIZES,
        inputs=load_npz(inputs_file) or None,
        rounds=rounds,
        threads=threads,
        provider=provider,
    )
    head = f"{rounds} rounds, {threads} thread{'s' if threads > 1 else ''}, {provider}"
    device = of_files(files, usable_provider(provider))
    text = "\n".join([head, *map(str, timings), *device.get("on_device", ())])
    fields: Json = {
        "rounds": rounds,
        "threads": threads,
        "timings": [t.to_json() for t in timings],
        **device,
    }
    emit(text, inputs=[{"model": f} for f in files], **fields)


def _size(text: str) -> tuple[int, int]:
    from lora_fx.errors import LoraFxError

    try:
        batch, length = (int(n) for n in text.split(","))
    except ValueError as e:
        raise LoraFxError(
            f"--size {text!r} is not BATCH,LENGTH", "pass --size 1,128, for example"
        ) from e
    if min(batch, length) < 1:
        raise LoraFxError(f"--size {text!r} has a size below 1", "pass --size 1,128, for example")
    return batch, length
