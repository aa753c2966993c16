"""lora-fx targets: list the weights that an adapter can attach to, and why others cannot."""

from __future__ import annotations

from pathlib import Path

import click

from lora_fx.cli.data_arguments import load_npz
from lora_fx.cli.file_command import FileCommand
from lora_fx.cli.model_argument import captured
from lora_fx.cli.model_options import PROGRAM, ModelOptions
from lora_fx.cli.options import first_given, names_of, option_group
from lora_fx.cli.output import emit
from lora_fx.errors import LoraFxError
from lora_fx.text import Json


@click.command("targets", cls=FileCommand, no_say=PROGRAM)
@click.argument("model")
@option_group("capture", ModelOptions)
@click.option(
    "--train", "training", is_flag=True, help="List the targets of the model in training mode."
)
def command(model: str, capture: ModelOptions, training: bool) -> None:
    r"""List the weights of MODEL that an adapter can attach to, and why others are no targets.

    MODEL is a Hugging Face folder, a .safetensors, .onnx or .pt2 file, file.py:factory,
    package.module:factory, timm:NAME, torchvision:NAME or hf:ORG/NAME. No weights are read; of
    hf:ORG/NAME only the configs are downloaded.

    \b
    lora-fx targets ./my-bert
    lora-fx targets torchvision:resnet18 --json
    """
    inputs: list[Json] = [{"model": model}]
    tensors = Path(model).is_file() and model.endswith((".safetensors", ".bin"))
    onnx = model.endswith(".onnx")
    has_say = {"trust"} if tensors else {"inputs_file"}
    no_say = [n for n in (*names_of(ModelOptions), "training") if n not in has_say]
    if (tensors or onnx) and (option := first_given(*no_say)):
        what = (
            "a file of which only names and shapes are read"
            if tensors
            else "which is already a graph"
        )
        raise LoraFxError(f"{option} has no effect for {model}, {what}", "leave it out")
    if tensors:
        from lora_fx.checkpoint.file_targets import file_targets

        found = file_targets(model)
    elif onnx:
        from lora_fx.passes.verbs.find_in_file import find_in_onnx

        found = find_in_onnx(model, load_npz(capture.inputs_file))
    else:
        from lora_fx.passes.verbs.adapt import find

        cap = captured(model, capture, meta=True)
        found, inputs = find(cap, training=training), cap.inputs.to_json()
    refused = None
    if not (found.targets or tensors):
        refused = LoraFxError(
            f"{model} has no weight matmul that an adapter could attach to",
            "read the reasons in the lines above",
        )
    fields = {"inputs": inputs, "warnings": found.notes, **found.to_json()}
    emit(str(found), refused=refused, **fields)
