"""lora-fx export: write a model as an ONNX file, with adapters folded in or switchable."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_fx.cli.adapter_arguments import named_adapters
from lora_fx.cli.data_arguments import load_npz, loss_of
from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.model_argument import captured
from lora_fx.cli.model_options import PROGRAM, ModelOptions
from lora_fx.cli.options import (
    flag,
    force_option,
    names_of,
    option,
    option_group,
    output_option,
    quantise_option,
    refuse_given,
    selectors,
    under_new_name,
)
from lora_fx.cli.output import emit, note, table, wrote
from lora_fx.errors import LoraFxError

if TYPE_CHECKING:
    from lora_fx.fx.capture.capture import Captured


@dataclass(frozen=True, kw_only=True)
class ModeOptions:
    """The options that belong to single modes."""

    include: tuple[str, ...] | None = selectors("--include", "Of switch, load, train: targets.")
    exclude: tuple[str, ...] | None = selectors("--exclude", "Of switch, load, train: leave out.")
    rank: int | None = option("--rank", type=int, help="Of load: the largest; of train, 8.")
    loss: str | None = option("--loss", help="Of train: ce, mse or module:function.")
    optimizer: str | None = option("--optimizer", help="Of train: adamw or sgd.")
    weight_decay: float | None = option(
        "--weight-decay", type=float, help="Of train: 0.01 without it."
    )
    clip: float | None = option(
        "--clip", type=float, help="Of train: longest gradient (norm), 1; 0 for any."
    )
    scales: bool = flag("--scales", "Of batch: an input of weights by row.")


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """The options of the file: its precision, its inputs, and its copies."""

    provider: str = option("--provider", default="auto", help="auto, cpu or cuda.")
    opset: int = option("--opset", type=int, default=20, help="ONNX operator set.")
    optimise: bool = flag("--optimise", "Rewrite the graph for ONNX Runtime, proven equal.")
    precision: str | None = option(
        "--precision",
        metavar="DTYPE",
        help="float16 or int8; of a bfloat16 model, float32 too.",
    )
    quantise: tuple[str, ...] = quantise_option()
    accuracy_level: int = option(
        "--accuracy-level", type=int, default=0, help="Of int4, int8 codes: 4 has x in int8."
    )
    tol: float | None = option(
        "--tol", type=float, metavar="REL", help="Accept rounding over its gate, up to this."
    )
    cache: bool = flag("--cache", "Of a decoder: its key-value cache goes in and out.")
    genai: str | None = option(
        "--genai", metavar="DIR", help="Of --cache: also a folder for onnxruntime-genai."
    )
    within: bool = flag("--within", "Leave out what fails at sizes outside `ranges`.")
    names: str | None = option(
        "--names", metavar="FILE", help="Of .onnx: JSON, adapter key to tensor."
    )
    old_names: str | None = option("--map", metavar="FILE", hidden=True)
    triton: str | None = option(
        "--triton", metavar="DIR", help="Also into a model repository of Triton."
    )
    max_batch: int | None = option(
        "--max-batch", type=int, metavar="N", help="Of --triton: rows of one batch."
    )

    def names_file(self) -> str | None:
        """The file of --names, or of --map, the old name of --names."""
        return under_new_name("--map", self.old_names, "--names", self.names)


@click.command("export", cls=ReportCommand, no_say=PROGRAM)
@click.argument("model")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER[:W]]...")
@output_option("X.onnx", "The file to write.")
@click.option("--mode", default="merged", help="merged, switch, load, batch or train.")
@option_group("of_mode", ModeOptions)
@option_group("file", FileOptions)
@option_group("capture", ModelOptions)
@force_option
def command(
    model: str,
    adapters: tuple[str, ...],
    output: str,
    mode: str,
    of_mode: ModeOptions,
    file: FileOptions,
    capture: ModelOptions,
    force: bool,
) -> None:
    r"""Write MODEL as an ONNX file, proven equal at three sizes.

    In mode merged ADAPTER is folded in. In mode switch adapters are chosen at run time, in mode
    load when a session is made, and every ADAPTER is written beside the file as
    NAME.onnx_adapter. In mode batch every row of a batch picks its own. Mode train writes a
    training step of ADAPTER, or of a new one, and its forward. MODEL may be an .onnx file too.
    ADAPTER may carry a weight, `my-adapter:0.5`. Without one the base model is exported.

    \b
    lora-fx export ./my-bert ./adapter -o bert.onnx
    lora-fx export ./my-bert ./de ./fr -o bert.onnx --mode switch
    lora-fx export ./my-bert ./de ./fr -o bert.onnx --mode batch
    lora-fx export ./my-llama ./adapter -o llama.onnx --cache
    lora-fx export ./my-llama ./de ./fr -o llama.onnx --cache --mode batch
    lora-fx export ./my-bert -o step.onnx --mode train --rank 8
    lora-fx export bert.onnx ./de ./fr -o switch.onnx --mode switch
    lora-fx export model.py:build ./adapter -o model.onnx --dynamic x:0=batch,2=height
    lora-fx export ./my-bert ./adapter -o bert.onnx --triton ./models
    """
    from lora_fx.errors import given_options
    from lora_fx.files.atomic import check_output
    from lora_fx.onnx.save import EXTERNAL_OVER
    from lora_fx.onnx.triton import repository_of
    from lora_fx.passes.verbs.export import export_as, refuse_genai
    from lora_fx.passes.verbs.export_options import ExportOptions
    from lora_fx.passes.verbs.options import CaptureOptions
    from lora_fx.passes.verbs.refused_updates import check_adapters

    if not output.endswith(".onnx"):
        raise LoraFxError(f"{output} does not end in .onnx", "-o model.onnx")
    check_output(output, force=force)
    if mode == "merged" and len(adapters) > 1:
        raise LoraFxError(
            f"merged takes one adapter, not {len(adapters)}", "--mode switch or batch"
        )
    is_graph = model.endswith(".onnx")
    updates = named_adapters(adapters)
    if updates and not (mode == "merged" and is_graph):
        check_adapters(updates, mode)
    loss = loss_of(of_mode.loss) if of_mode.loss else None
    arrays = load_npz(capture.inputs_file) or None
    names_file = file.names_file()
    names = None
    if is_graph:
        from lora_fx.onnx.match import read_map

        of_capture = [name for name in names_of(ModelOptions) if name != "inputs_file"]
        refuse_given(model, ("opset", *of_capture, "quantise", "accuracy_level"))
        names = read_map(names_file)
        source: str | Captured = model
        inputs = [{"model": model}]
    else:
        if names_file:
            raise LoraFxError("--names is of .onnx files", "a model's own names tell")
        refuse_genai(file.genai, mode, cache=file.cache)
        check = partial(_check_genai, file.genai, output, force) if file.genai else None
        source = captured(model, capture, cache=file.cache, check=check)
        inputs = source.inputs.to_json()

    options = ExportOptions(
        target=Path(output),
        adapters=next(iter(updates.values()), None) if mode == "merged" else updates,
        mode=mode,
        include=of_mode.include,
        exclude=of_mode.exclude,
        rank=of_mode.rank,
        scales=of_mode.scales,
        loss=loss,
        optimizer=of_mode.optimizer,
        weight_decay=of_mode.weight_decay,
        clip=of_mode.clip,
        names=names,
        inputs=arrays,
        provider=file.provider,
        opset=None if is_graph else file.opset,
        external_over=EXTERNAL_OVER,
        capture=CaptureOptions(cache=file.cache, repeat=not capture.no_repeat),
        force=force,
        optimise=file.optimise,
        precision=file.precision,
        places=repository_of(file.triton, output, file.max_batch),
        within=file.within,
        accuracy_level=file.accuracy_level,
        tol=file.tol,
    )
    given = given_options({"inputs": arrays, "within": file.within})
    report = export_as(source, options, given, quantise=file.quantise, genai=file.genai)
    if is_graph:
        note(*report.warnings, warns=True)
    said = f"{report}{table(report)}\n{wrote(report)}"
    emit(said, **{**report.to_json(), "inputs": inputs})


def _check_genai(folder: str, output: str, force: bool, config: object) -> None:
    """Refuse, before any work, a model that onnxruntime-genai cannot run."""
    from lora_fx.onnx.genai import genai_folder

    genai_folder(folder, Path(output), config, force=force)
