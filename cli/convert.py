"""lora-fx convert: an adapter from one file format to another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from lora_fx.adapter.expert_layouts import LAYOUTS
from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.options import (
    TRUST,
    Rules,
    flag,
    force_option,
    option,
    option_group,
    output_option,
    selectors,
)
from lora_fx.cli.output import emit, note
from lora_fx.errors import LoraFxError, NoSay, near_path
from lora_fx.formats.io import format_for, format_of, load_adapter, save_adapter, save_for
from lora_fx.formats.registry import FORMATS
from lora_fx.text import Json, counted


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}"


NAMES = list(dict.fromkeys([*FORMATS.writers(), *LAYOUTS]))

HELP = rf"""Write ADAPTER to OUT in another format; what the format cannot store is an error.

The format of ADAPTER is recognised by its content: {", ".join(FORMATS)}. OUT is a folder
({FORMATS.default.name}), or a file with the ending of its format. Where several formats have that
ending, such as .safetensors, choose one with --format.

{_listed(LAYOUTS)} are PEFT folders that store the experts of a mixture as these releases and
servers expect them.

\b
lora-fx convert ./adapter -o adapter.onnx_adapter
lora-fx convert ./adapter -o de.onnx_adapter --for bert.onnx
lora-fx convert ./adapter -o adapter.gguf --base ./llama
lora-fx convert style.safetensors -o ./adapter --base ./stable-diffusion/unet
lora-fx convert ./adapter -o ./served --format vllm --base ./mixtral
"""

NO_SAY: Rules = (
    NoSay(
        ("model_type",), lambda asked: asked["name"] not in LAYOUTS,
        "without a --format that has a layout for experts", f"pass --format {' or '.join(LAYOUTS)}",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChangeOptions:
    """Options that change the updates while they are converted."""

    model_type: str | None = option(
        "--model-type",
        metavar="TYPE",
        help="Name the base's transformers model type, such as mixtral, in place of --base: it "
        "says how releases and servers store the experts.",
    )
    kind: str | None = option(
        "--as", type=click.Choice(["lora"]), help="Write LoHa, LoKr, DoRA and others as LoRA."
    )
    rank: int | None = option(
        "--rank",
        type=int,
        help="Set the rank of the LoRA that --as lora writes in place of another method.",
    )
    energy: float | None = option(
        "--energy",
        type=float,
        help="Choose the ranks of the LoRA that --as lora writes so that they keep this share of "
        "‖ΔW‖², such as 0.99.",
    )
    fuse: bool = flag(
        "--fuse", "Join updates of q, k and v, or of gate and up, as --base joins their weights."
    )
    split: bool = flag(
        "--split", "Split updates of joined weights into q, k and v, or gate and up."
    )
    rows: str | None = option(
        "--map",
        metavar="FILE",
        help="Read the rows of each part from a JSON file, for --fuse and --split.",
    )
    include: tuple[str, ...] | None = selectors(
        "--include", "Write only these updates of the adapter.  [default: all]"
    )
    exclude: tuple[str, ...] | None = selectors(
        "--exclude", "Leave out these updates of the adapter."
    )
    trust: bool = flag("--trust", TRUST)


@click.command("convert", cls=ReportCommand, no_say=NO_SAY, help=HELP)
@click.argument("adapter")
@output_option("OUT", "Name the file or folder to write.")
@click.option(
    "--format",
    "name",
    type=click.Choice(NAMES),
    metavar="FORMAT",
    help=f"Choose the format of OUT: {', '.join(NAMES)}.  [default: the only one with this ending]",
)
@click.option(
    "--base",
    metavar="FOLDER",
    help="Name the base model, where a format needs its names, heads or weights.",
)
@click.option(
    "--for",
    "model",
    metavar="X.onnx",
    help="Name the switch file (.onnx, or .pt2) that will load OUT.",
)
@option_group("changes", ChangeOptions)
@force_option
def command(
    adapter: str,
    output: str,
    name: str | None,
    base: str | None,
    model: str | None,
    changes: ChangeOptions,
    force: bool,
) -> None:
    """Convert an adapter between file formats; HELP is the text of --help."""
    if base and not Path(base).exists():
        raise LoraFxError(f"{base}: cannot be read: no such file or folder", near_path(base))
    wanted = name or format_for(output, of_graph=model is not None)
    layout = LAYOUTS.get(name or "")
    name = FORMATS.default.name if wanted in LAYOUTS else wanted
    source = format_of(adapter)
    loaded = load_adapter(adapter, base=base)
    if changes.include or changes.exclude:
        loaded = loaded.select(changes.include or "", changes.exclude or "")
    fields: Json = {"from": source, "to": wanted, "approximated": []}
    said = ""
    if changes.kind:
        from lora_fx.checkpoint.merge_delta import plain_in

        loaded, rows = plain_in(base, loaded, rank=changes.rank, energy=changes.energy)
        fields["approximated"] = [row.to_json() for row in rows]
        said = "".join(f"{row}\n" for row in rows)
    elif changes.rank is not None or changes.energy is not None:
        raise LoraFxError(
            "--rank and --energy need --as lora",
            "pass --as lora; or use lora-fx truncate for a LoRA adapter",
        )
    if changes.fuse or changes.split or changes.rows:
        from lora_fx.checkpoint.refit import refitted

        loaded, moved = refitted(loaded, base, changes.fuse, changes.split, changes.rows)
        said += "".join(f"{line}\n" for line in moved)
    if layout:  # else experts stay as they are
        from lora_fx.checkpoint.stored_stacks import laid_for

        loaded = laid_for(loaded, layout, base, changes.model_type)
    notes = [*loaded.metadata.get("notes", [])]
    if model is None:
        notes += save_adapter(loaded, output, name, force=force, base=base)
    else:
        notes += save_for(model, loaded, output, name, force=force)
    note(*notes)
    fields["updates"] = len(loaded)
    said += f"wrote {output}: {counted(len(loaded), 'update')}, {source} → {wanted}"
    emit(said, inputs=[{"adapter": adapter}], outputs=[output], **fields)
