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

HELP = rf"""Write ADAPTER to OUT in another format; what the format cannot say is an error.

ADAPTER's own format is told by its content: {", ".join(FORMATS)}. OUT is a folder
({FORMATS.default.name}), or a file whose name ends as those of its format do; where several have
that ending, as .safetensors, --format says which.

{_listed(LAYOUTS)} are files of PEFT, with the experts of a mixture as these releases and programs
have them.

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
        "without a --format that lays experts out", f"--format {' or '.join(LAYOUTS)}",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChangeOptions:
    """Options that change the updates while they are converted."""

    model_type: str | None = option(
        "--model-type",
        metavar="TYPE",
        help="The base's, in its place, for experts alone.",
    )
    kind: str | None = option(
        "--as", type=click.Choice(["lora"]), help="LoHa, LoKr, DoRA … as LoRA."
    )
    rank: int | None = option("--rank", type=int, help="Of --as.")
    energy: float | None = option(
        "--energy", type=float, help="Of --as, instead: the share of ‖ΔW‖² to keep."
    )
    fuse: bool = flag("--fuse", "q, k, v, or gate, up, become one, as in --base.")
    split: bool = flag("--split", "The reverse.")
    rows: str | None = option(
        "--map", metavar="FILE", help="Of both: whose rows are which, as JSON."
    )
    include: tuple[str, ...] | None = selectors(
        "--include", "Of the adapter: the updates to write.  [default: all]"
    )
    exclude: tuple[str, ...] | None = selectors(
        "--exclude", "Of the adapter: updates to leave out."
    )
    trust: bool = flag("--trust", TRUST)


@click.command("convert", cls=ReportCommand, no_say=NO_SAY, help=HELP)
@click.argument("adapter")
@output_option("OUT", "The file or folder to write.")
@click.option(
    "--format",
    "name",
    type=click.Choice(NAMES),
    metavar="FORMAT",
    help=f"Of OUT: {', '.join(NAMES)}.  [default: told by its name where only one is called so]",
)
@click.option(
    "--base",
    metavar="FOLDER",
    help="The model that it is for, where ADAPTER or OUT depends on it: its names, heads or W.",
)
@click.option("--for", "model", metavar="X.onnx", help="The switchable file that OUT is for.")
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
    wanted = name or format_for(output)
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
            "--rank and --energy are of --as lora", "lora-fx truncate takes ranks away"
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
