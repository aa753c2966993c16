"""lora-fx extract: an adapter recovered from two checkpoints, by SVD."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

import click

from lora_fx.cli import options as shared
from lora_fx.cli.common import ReportCommand
from lora_fx.cli.output import emit, note, say


@click.command("extract", cls=ReportCommand)
@click.argument("base")
@click.argument("tuned")
@shared.output_option("ADAPTER", "Folder or .safetensors.")
@click.option("--rank", "-r", type=int, help="Of every update.  [default: 16]")
@click.option("--energy", type=float, help="Instead: per tensor what holds this share of ‖Δ‖².")
@click.option("--max-rank", type=int, help="Cap of what --energy chooses.  [default: 128]")
@shared.selectors_option("--include", "Weights to look at.")
@shared.selectors_option("--exclude", "Tensors to leave out.")
@shared.flag_option("--also-full", "Take norms and biases that differ, whole.")
@shared.selectors_option("--whole", "Tensors to take whole where they differ, such as a head.")
@shared.flag_option("--allow-missing", "Leave out tensors that do not fit.")
@click.option(
    "--fan-in-fan-out/--no-fan-in-fan-out",
    default=None,
    help="Linear weights are stored [in, out].  [default: config.json says]",
)
@shared.seed_option("Of the random subspaces.")
@shared.trust_option
@shared.force_option
def command(base: str, tuned: str, output: str, force: bool, **options: Any) -> None:
    r"""Recover an adapter that turns BASE into TUNED.

    Both are Hugging Face folders or .safetensors files with the same tensors. They are read one
    tensor at a time; no model is built.

    \b
    lora-fx extract ./llama ./llama-chat -o chat --rank 32
    lora-fx extract base.safetensors tuned.safetensors -o x --energy 0.9 --max-rank 64
    """
    from lora_fx.checkpoint.extract import ExtractOptions, extraction
    from lora_fx.files.atomic import check_output
    from lora_fx.formats.io import FORMATS, save_adapter

    check_output(output, force=force, names=FORMATS.default.folder_files)
    result = extraction(base, tuned, ExtractOptions(**options), _progress())
    said = save_adapter(result.adapter, output, force=force)
    note(*result.adapter.metadata["notes"], *said)
    text, inputs = f"{result}\nwrote {output}", [{"base": base, "tuned": tuned}]
    emit(text, inputs=inputs, outputs=[output], **result.to_json())


def _progress() -> Callable[[float], None]:
    """Says how far it is, every ten seconds."""
    last = monotonic()

    def tell(share: float) -> None:
        nonlocal last
        if monotonic() - last > 10 and share < 1:
            last = monotonic()
            say(f"{share:.0%} compared")

    return tell
