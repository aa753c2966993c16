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
from lora_fx.cli.model_page import show_graph
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


def _sizes_by_name(text: str | None) -> dict[str, int] | None:
    """Return the sizes of `batch=8,length=128`; None without a text."""
    if text is None:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if not name or not number.isdecimal():
            raise LoraFxError(
                f"--largest {part!r} is no NAME=N", "pass --largest batch=8,length=128, for example"
            )
        if name in sizes:
            raise LoraFxError(f"--largest has {name!r} more than once", "pass one size for a name")
        sizes[name] = int(number)
    return sizes


@dataclass(frozen=True, kw_only=True)
class ModeOptions:
    """The options that belong to single modes."""

    include: tuple[str, ...] | None = selectors(
        "--include", "Choose targets (modes switch, load and train)."
    )
    exclude: tuple[str, ...] | None = selectors(
        "--exclude", "Leave out targets (modes switch, load and train)."
    )
    rank: int | None = option(
        "--rank",
        type=int,
        help="Set the highest rank that can be loaded (mode load, and a .pt2 file), or the rank "
        "of a new adapter (mode train: 8).",
    )
    largest: str | None = option(
        "--largest",
        metavar="NAME=N,…",
        help="Set the largest sizes of free dimensions, and of the rank (a .pt2 file).",
    )
    variant: str | None = option(
        "--variant",
        type=click.Choice(["lora", "dora"]),
        help="Choose what every slot takes: dora is DoRA and plain LoRA (modes switch and load).  "
        "[default: what the adapters are]",
    )
    loss: str | None = option(
        "--loss", help="Choose the loss: ce, mse or module:function (mode train)."
    )
    optimizer: str | None = option("--optimizer", help="Choose adamw or sgd (mode train).")
    weight_decay: float | None = option(
        "--weight-decay", type=float, help="Set the weight decay (mode train: 0.01)."
    )
    clip: float | None = option(
        "--clip",
        type=float,
        help="Scale gradients down to this norm; 0 leaves them (mode train: 1).",
    )
    scales: bool = flag(
        "--scales", "Add an input that weights the adapters of every row (mode batch)."
    )


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """The options of the file: its precision, its inputs, and its copies."""

    provider: str = option(
        "--provider", default="auto", help="Run ONNX Runtime on auto, cpu, cuda or webgpu."
    )
    target: str = option(
        "--target",
        default="cpu",
        help="Make the file for cpu, cuda or webgpu, whose graph has the forms that are fast "
        "there; or portable, for other runtimes too.",
    )
    opset: int | None = option(
        "--opset", type=int, help="Write this version of the ONNX operator set.  [default: 20]"
    )
    optimise: bool = flag(
        "--optimise", "Rewrite the graph for ONNX Runtime; the result is compared."
    )
    precision: str | None = option(
        "--precision",
        metavar="DTYPE",
        help="Compute in float16 or int8; a bfloat16 model also in float32.",
    )
    quantise: tuple[str, ...] = quantise_option()
    accuracy_level: int = option(
        "--accuracy-level",
        type=int,
        default=0,
        help="Choose how products with int4 or int8 codes are computed; 4 rounds x to int8.",
    )
    tol: float | None = option(
        "--tol",
        type=float,
        metavar="REL",
        help="Accept a larger rounding error than the gate, up to this.",
    )
    cache: bool = flag("--cache", "Pass the key-value cache of a decoder in and out.")
    genai: str | None = option(
        "--genai", metavar="DIR", help="Also write a folder for onnxruntime-genai (with --cache)."
    )
    probe: str = option(
        "--probe",
        default="full",
        help="Write a probe of the file: full; short, without groups of targets; or none.",
    )
    within: bool = flag(
        "--within", "Leave out the checks in the file that fail at sizes it is not true for."
    )
    names: str | None = option(
        "--names",
        metavar="FILE",
        help="Read from a JSON file which tensor each adapter key names (an .onnx model).",
    )
    old_names: str | None = option("--map", metavar="FILE", hidden=True)
    triton: str | None = option(
        "--triton", metavar="DIR", help="Also write a model repository for Triton."
    )
    max_batch: int | None = option(
        "--max-batch", type=int, metavar="N", help="Set the most rows of a batch in Triton."
    )

    def names_file(self) -> str | None:
        """The file of --names, or of --map, the old name of --names."""
        return under_new_name("--map", self.old_names, "--names", self.names)


@click.command("export", cls=ReportCommand, no_say=PROGRAM)
@click.argument("model")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER[:W]]...")
@output_option("X.onnx", "Name the file to write.")
@click.option(
    "--mode", default="merged", help="Choose what is written: merged, switch, load, batch or train."
)
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
    r"""Write MODEL as an ONNX file that is checked against the model at three sizes.

    \b
    --mode merged  folds ADAPTER into the weights; without ADAPTER the base model is written
    --mode switch  keeps adapters apart, as NAME.onnx_adapter (.safetensors for other runtimes,
                   with --target portable or -o X.pt2); each run chooses one
    --mode load    keeps adapters apart likewise; a session is created with one
    --mode batch   stores all adapters in the file; each row of a batch chooses one
    --mode train   writes a training step for ADAPTER or a new one, and its forward pass

    With -o X.pt2 and --mode switch, a program of torch is written, which takes A and B as
    inputs: other runtimes compile it once and run it with every adapter.

    MODEL may also be an .onnx file. ADAPTER:W multiplies the adapter by W.

    \b
    lora-fx export ./my-bert ./adapter -o bert.onnx
    lora-fx export ./my-bert ./de ./fr -o bert.onnx --mode switch
    lora-fx export ./my-bert ./de ./fr -o bert.onnx --mode switch --target portable
    lora-fx export ./my-bert ./de ./fr -o bert.pt2 --mode switch
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
    from lora_fx.onnx.session import check_provider
    from lora_fx.onnx.triton import repository_of
    from lora_fx.passes.verbs.export import export_as, refuse_genai
    from lora_fx.passes.verbs.export_options import ExportOptions, expect_ending
    from lora_fx.passes.verbs.options import CaptureOptions
    from lora_fx.passes.verbs.refused_updates import check_adapters

    expect_ending(output)
    check_output(output, force=force)
    check_provider(file.provider)
    if mode == "merged" and len(adapters) > 1:
        raise LoraFxError(
            f"--mode merged takes one adapter, not {len(adapters)}", "pass --mode switch or batch"
        )
    if mode == "batch" and not adapters:
        raise LoraFxError(
            "mode batch needs adapters", "pass them after MODEL: lora-fx export MODEL ADAPTER..."
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
        show_graph(model)
        source: str | Captured = model
        inputs = [{"model": model}]
    else:
        if names_file:
            raise LoraFxError("--names is for .onnx models only", "leave it out")
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
        largest=_sizes_by_name(of_mode.largest),
        variant=of_mode.variant,
        scales=of_mode.scales,
        loss=loss,
        optimizer=of_mode.optimizer,
        weight_decay=of_mode.weight_decay,
        clip=of_mode.clip,
        names=names,
        inputs=arrays,
        provider=file.provider,
        made_for=file.target,
        opset=file.opset,
        external_over=EXTERNAL_OVER,
        capture=CaptureOptions(cache=file.cache, repeat=not capture.no_repeat),
        force=force,
        optimise=file.optimise,
        precision=file.precision,
        places=repository_of(file.triton, output, file.max_batch),
        within=file.within,
        accuracy_level=file.accuracy_level,
        tol=file.tol,
        probe=file.probe,
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
