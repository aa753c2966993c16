"""lora-fx extract: recover an adapter from two checkpoints, by SVD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

import click

from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.options import (
    TRUST,
    flag,
    force_option,
    option,
    option_group,
    output_option,
    seed_option,
    selectors,
)
from lora_fx.cli.output import emit, note, say

if TYPE_CHECKING:
    from lora_fx.checkpoint.extract_options import ExtractOptions


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """Options for the compared tensors and the ranks of the updates."""

    rank: int | None = option(
        "--rank", "-r", type=int, help="Set the rank of every update.  [default: 16]"
    )
    energy: float | None = option(
        "--energy",
        type=float,
        help="Choose each rank so that it keeps this share of ‖Δ‖², in place of --rank.",
    )
    max_rank: int | None = option(
        "--max-rank", type=int, help="Limit the ranks that --energy chooses.  [default: 128]"
    )
    include: tuple[str, ...] | None = selectors("--include", "Extract only these weights.")
    exclude: tuple[str, ...] | None = selectors("--exclude", "Leave out these tensors.")
    also_full: bool = flag("--also-full", "Store norms and biases that differ whole.")
    whole: tuple[str, ...] | None = selectors(
        "--whole", "Store these tensors whole where they differ, such as a head."
    )
    allow_missing: bool = flag(
        "--allow-missing", "Leave out tensors that only one model has, or whose shapes differ."
    )
    fan_in_fan_out: bool | None = option(
        "--fan-in-fan-out/--no-fan-in-fan-out",
        default=None,
        help="Read linear weights as [in, out].  [default: as config.json says]",
    )
    seed: int = seed_option("Seed the random subspaces of the SVD.")
    trust: bool = flag("--trust", TRUST)

    def extract(self) -> ExtractOptions:
        """The options of an extraction; raises if options exclude each other."""
        from lora_fx.checkpoint.extract_options import ExtractOptions

        return ExtractOptions(
            rank=self.rank,
            energy=self.energy,
            max_rank=self.max_rank,
            include=self.include,
            exclude=self.exclude,
            also_full=self.also_full,
            allow_missing=self.allow_missing,
            fan_in_fan_out=self.fan_in_fan_out,
            seed=self.seed,
            whole=self.whole,
            trust=self.trust,
        )


@click.command("extract", cls=ReportCommand)
@click.argument("base")
@click.argument("tuned")
@output_option("ADAPTER", "Write an adapter folder or a .safetensors file.")
@option_group("wanted", RecoveryOptions)
@force_option
def command(base: str, tuned: str, output: str, wanted: RecoveryOptions, force: bool) -> None:
    r"""Extract an adapter that turns BASE into TUNED.

    BASE and TUNED are Hugging Face folders or .safetensors files with the same tensors. They are
    read one tensor at a time, and no model is built.

    \b
    lora-fx extract ./llama ./llama-chat -o chat --rank 32
    lora-fx extract base.safetensors tuned.safetensors -o x --energy 0.9 --max-rank 64
    """
    from lora_fx.checkpoint.extract import extraction
    from lora_fx.files.atomic import check_output
    from lora_fx.formats.io import FORMATS, save_adapter

    check_output(output, force=force, names=FORMATS.default.folder_files)
    result = extraction(base, tuned, wanted.extract(), _progress())
    said = save_adapter(result.adapter, output, force=force)
    note(*result.adapter.metadata["notes"], *said)
    text, inputs = f"{result}\nwrote {output}", [{"base": base, "tuned": tuned}]
    emit(text, inputs=inputs, outputs=[output], **result.to_json())


def _progress() -> Callable[[float], None]:
    """A function that prints the progress every ten seconds."""
    last = monotonic()

    def tell(share: float) -> None:
        nonlocal last
        if monotonic() - last > 10 and share < 1:
            last = monotonic()
            say(f"{share:.0%} compared")

    return tell
