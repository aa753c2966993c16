"""lora-fx convert: an adapter from one file format to another."""

from __future__ import annotations

from typing import Any, cast

import click

from lora_fx.adapter.fused import LAYOUTS
from lora_fx.cli import options as shared
from lora_fx.cli.common import ReportCommand
from lora_fx.cli.output import emit, note
from lora_fx.errors import LoraFxError, NoSay
from lora_fx.formats.io import WRITERS, Format, format_for, format_of, load_adapter, save_adapter
from lora_fx.text import Json

NAMES = list(dict.fromkeys([*WRITERS, *LAYOUTS]))


NO_SAY: shared.Rules = (
    NoSay(
        ("model_type",), lambda asked: asked["name"] not in LAYOUTS,
        "without a --format that lays experts out", f"--format {' or '.join(LAYOUTS)}",
    ),
)  # fmt: skip


@click.command("convert", cls=ReportCommand, no_say=NO_SAY)
@click.argument("adapter")
@shared.output_option("OUT", "The file or folder to write.")
@click.option(
    "--format",
    "name",
    type=click.Choice(NAMES),
    metavar="FORMAT",
    help=f"Of OUT: {', '.join(NAMES)}.  [default: told by its name where only one is called so]",
)
@shared.text_option(
    "--base",
    "FOLDER",
    "The model that it is for, where ADAPTER or OUT depends on it: its names, heads or W.",
)
@click.option("--for", "model", metavar="X.onnx", help="The switchable file that OUT is for.")
@shared.text_option("--model-type", "TYPE", "The base's, in its place, for experts alone.")
@click.option("--as", "kind", type=click.Choice(["lora"]), help="LoHa, LoKr, DoRA … as LoRA.")
@click.option("--rank", type=int, help="Of --as.")
@click.option("--energy", type=float, help="Of --as, instead: the share of ‖ΔW‖² to keep.")
@shared.fuse_options
@shared.selectors_option("--include", "Of the adapter: the updates to write.  [default: all]")
@shared.selectors_option("--exclude", "Of the adapter: updates to leave out.")
@shared.trust_option
@shared.force_option
def command(
    adapter: str,
    output: str,
    name: str | None,
    base: str | None,
    model: str | None,
    force: bool,
    **options: Any,
) -> None:
    r"""Write ADAPTER to OUT in another format; what the format cannot say is an error.

    ADAPTER's own format is told by its content: peft, kohya, diffusers, torchtune, onnx_adapter,
    gguf. OUT is a folder (peft), or ends in .onnx_adapter or .gguf, or in .safetensors with
    --format.

    peft, peft-0.18, per-expert, per-expert-fused, vllm, sglang and sglang-3d are files of PEFT,
    with the experts of a mixture as these releases and programs have them.

    \b
    lora-fx convert ./adapter -o adapter.onnx_adapter
    lora-fx convert ./adapter -o de.onnx_adapter --for bert.onnx
    lora-fx convert ./adapter -o adapter.gguf --base ./llama
    lora-fx convert style.safetensors -o ./adapter --base ./stable-diffusion/unet
    lora-fx convert ./adapter -o ./served --format vllm --base ./mixtral
    """
    wanted = name or format_for(output)
    layout, name = LAYOUTS.get(name or ""), "peft" if wanted in LAYOUTS else wanted
    source = format_of(adapter)
    loaded = load_adapter(adapter, base=base)
    if options["include"] or options["exclude"]:
        loaded = loaded.select(options["include"] or "", options["exclude"] or "")
    fields: Json = {"from": source, "to": wanted, "approximated": []}
    said = ""
    if options["kind"]:
        from lora_fx.checkpoint.merge import plain_in

        loaded, rows = plain_in(base, loaded, rank=options["rank"], energy=options["energy"])
        fields["approximated"] = [row.to_json() for row in rows]
        said = "".join(f"{row}\n" for row in rows)
    elif options["rank"] is not None or options["energy"] is not None:
        raise LoraFxError(
            "--rank and --energy are of --as lora", "lora-fx truncate takes ranks away"
        )
    if any(given := [options[n] for n in ("fuse", "split", "rows")]):
        from lora_fx.checkpoint.renaming import refitted

        loaded, moved = refitted(loaded, base, *given)
        said += "".join(f"{line}\n" for line in moved)
    if layout:  # else experts stay as they are
        from lora_fx.checkpoint.match import laid_for

        loaded = laid_for(loaded, layout, base, options["model_type"])
    notes = [*loaded.metadata.get("notes", [])]
    if model is None:
        notes += save_adapter(loaded, output, cast(Format, name), force=force, base=base)
    elif name == "onnx_adapter":
        from lora_fx.onnx.session import write_for

        write_for(model, loaded, output, force=force)
    else:
        raise LoraFxError(f"--for is for onnx_adapter, not for {name}", "-o X.onnx_adapter")
    note(*notes)
    fields["updates"] = len(loaded)
    said += f"wrote {output}: {len(loaded)} updates, {source} → {wanted}"
    emit(said, inputs=[{"adapter": adapter}], outputs=[output], **fields)
