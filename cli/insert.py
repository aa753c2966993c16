"""lora-fx insert: untrained branches, as an adapter folder to start from."""

from __future__ import annotations

from typing import Any

import click

from lora_fx.cli import options as shared
from lora_fx.cli.common import ReportCommand
from lora_fx.cli.output import emit, note
from lora_fx.text import Json


@click.command(
    "insert", cls=ReportCommand, no_say=(*shared.PLANNED, *shared.STARTED, *shared.PROGRAM)
)
@click.argument("model")
@shared.output_option("OUT", "Folder, .safetensors, .pt2; .onnx from .onnx.")
@shared.target_options
@shared.text_option("--data", "DATA", "Data that --init eva or lora-ga reads.")
@shared.label_option("Its labels.")
@click.option("--loss", default="ce", help="ce, mse or module:function.")
@shared.model_options
@shared.force_option
def command(model: str, output: str, force: bool, **options: Any) -> None:
    r"""Insert untrained branches and write them.

    OUT is an adapter folder or .safetensors file (a start for any trainer; PEFT loads it), or a
    .pt2 program: the eval and train graphs with their branches, over one set of weights. Every
    command, and torch.export.load, opens it without the model's source.

    An .onnx file becomes an .onnx file, with branches that a trainer of ONNX graphs can train
    (lora-fx convert takes the adapter out of it again).

    \b
    lora-fx insert ./my-bert -o start --rank 16 --include q,v
    lora-fx insert model.py:build -o model.pt2
    lora-fx insert bert.onnx -o branches.onnx --rank 4
    """
    from lora_fx.files.atomic import check_output
    from lora_fx.formats.io import FORMATS, save_adapter
    from lora_fx.passes.verbs.adapt import insert

    check_output(output, force=force, names=FORMATS.default.folder_files)
    if model.endswith(".onnx"):
        _onnx(model, output, force, options)
        return
    loaded, cap = shared.captured(model, options)
    start = shared.start_from(loaded, cap, options)
    module = insert(cap, **shared.only_given(options), **start)
    report = module.report()
    if output.endswith(".pt2"):
        from lora_fx.passes.verbs.program import save_program

        said = save_program(module, output, force=force)
    else:
        said = save_adapter(module.adapter(), output, force=force)
    note(*said)
    fields = {"inputs": cap.inputs.to_json(), "outputs": [output], **report.to_json()}
    emit(f"{report}\nwrote {output}", warnings=report.notes, **fields)


def _onnx(model: str, output: str, force: bool, options: Json) -> None:
    from lora_fx.errors import LoraFxError
    from lora_fx.passes.verbs.adapt import insert_onnx

    if not output.endswith(".onnx"):
        raise LoraFxError(f"{output} does not end in .onnx, and {model} does", "-o OUT.onnx")
    arrays = shared.load_npz(options.pop("inputs_file")) or None
    capture = [n for n in shared.CAPTURE if n != "inputs_file"]
    no_say = ("also_train", "dropout", "quantise", *shared.START, *capture)
    shared.refuse_given(model, no_say)
    kept = {k: v for k, v in shared.only_given(options).items() if k not in no_say}
    report = insert_onnx(model, output, inputs=arrays, force=force, **kept)
    note(*report.warnings, warns=True)
    count, trained = len(report.details["targets"]), report.details["trained"]
    said = f"{count} targets, {trained} elements to train\n{report}\nwrote {output}"
    emit(said, **{**report.to_json(), "inputs": [{"model": model}]})
