"""lora-fx insert: write untrained branches as an adapter to start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from lora_fx.cli.branch_options import PLANNED, TargetOptions
from lora_fx.cli.data_arguments import (
    batches_of,
    load_npz,
    loss_of,
    refuse_row_labels,
    training_data,
)
from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.invocation_option import invocation_of
from lora_fx.cli.model_argument import captured
from lora_fx.cli.model_options import PROGRAM, ModelOptions
from lora_fx.cli.options import (
    Rules,
    force_option,
    label_option,
    loss_option,
    names_of,
    option,
    option_group,
    output_option,
    refuse_given,
)
from lora_fx.cli.output import emit, note
from lora_fx.errors import LoraFxError, NoSay
from lora_fx.text import JsonView, counted

if TYPE_CHECKING:
    from lora_fx.fx.capture.capture import Captured


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The data that --init eva and lora-ga read."""

    data: str | None = option(
        "--data", metavar="DATA", help="Give the data that --init eva and --init lora-ga read."
    )
    label: str = label_option("Name the column of labels of --data.")
    loss: str = loss_option()


def _reads_no_data(asked: JsonView) -> bool:
    from lora_fx.adapter.starts import OF_DATA

    return asked["init"] not in OF_DATA


STARTED: Rules = (
    NoSay(("label", "loss"), _reads_no_data, "for --init {0[init]}, which reads no data"),
    NoSay(
        ("loss",), lambda asked: asked["init"] == "eva", "for --init eva, which reads no gradient"
    ),
)


@click.command("insert", cls=ReportCommand, no_say=(*PLANNED, *STARTED, *PROGRAM))
@click.argument("model")
@output_option(
    "OUT", "Write an adapter folder, a .safetensors or a .pt2 file; from .onnx, an .onnx file."
)
@option_group("targets", TargetOptions)
@option_group("start", StartOptions)
@option_group("capture", ModelOptions)
@force_option
def command(
    model: str,
    output: str,
    targets: TargetOptions,
    start: StartOptions,
    capture: ModelOptions,
    force: bool,
) -> None:
    r"""Insert untrained low-rank branches into MODEL and write them to OUT.

    OUT is one of two things. An adapter folder or .safetensors file holds the first values of the
    adapter: PEFT and other trainers load it. A .pt2 program holds the graphs for evaluation and
    for training, with branches, over one set of weights: every command and torch.export.load
    open it without the source of the model.

    From an .onnx file OUT is an .onnx file with branches, for trainers of ONNX graphs;
    lora-fx convert reads the trained adapter from it.

    \b
    lora-fx insert ./my-bert -o start --rank 16 --include q,v
    lora-fx insert model.py:build -o model.pt2
    lora-fx insert bert.onnx -o branches.onnx --rank 4
    """
    from lora_fx.files.atomic import check_output
    from lora_fx.formats.io import FORMATS, save_adapter
    from lora_fx.passes.verbs.adapt import insert_into

    check_output(output, force=force, names=FORMATS.default.folder_files)
    if model.endswith(".onnx"):
        _onnx(model, output, targets, capture, force=force)
        return

    cap = captured(model, capture)
    data = _start_batches(cap, targets.init, start)
    tokens = invocation_of(targets.invocation, cap)
    if targets.init == "lora-ga":
        options = targets.insert(data, loss_of(start.loss), tokens)
    else:
        options = targets.insert(data, invocation=tokens)
    module = insert_into(cap, options, targets.quantise)
    report = module.report()
    if output.endswith(".pt2"):
        from lora_fx.passes.verbs.program import save_program

        said = save_program(module, output, force=force)
    else:
        said = save_adapter(module.adapter(), output, force=force)
    note(*said)
    fields = {"inputs": cap.inputs.to_json(), "outputs": [output], **report.to_json()}
    emit(f"{report}\nwrote {output}", warnings=report.notes, **fields)


def _start_batches(cap: Captured, init: str, options: StartOptions) -> Iterator[JsonView] | None:
    """Return the batches that --init reads; None if --init reads no data.

    Raises:
        LoraFxError: Data for a start that reads none, or none for one that does.
    """
    from lora_fx.adapter.starts import OF_DATA

    data = options.data
    if init not in OF_DATA:
        if data:
            raise LoraFxError(
                f"--data has no effect with --init {init}",
                f"leave it out, or pass --init {' or '.join(OF_DATA)}",
            )
        return None
    if not data:
        raise LoraFxError(
            f"--init {init} needs data", "pass --data FILE, in a format of lora-fx train"
        )
    table = training_data(data, cap, options.label)
    if init == "lora-ga":
        refuse_row_labels(table, cap, data, options.loss)
    return batches_of(table)


def _onnx(
    model: str, output: str, targets: TargetOptions, capture: ModelOptions, *, force: bool
) -> None:
    """Insert branches into an .onnx file."""
    from lora_fx.passes.verbs.insert_onnx import OnnxInsertOptions, insert_into_file

    if not output.endswith(".onnx"):
        raise LoraFxError(
            f"{output} does not end in .onnx, but {model} does",
            "pass a name that ends in .onnx: -o OUT.onnx",
        )
    arrays = load_npz(capture.inputs_file) or None
    of_capture = [name for name in names_of(ModelOptions) if name != "inputs_file"]
    of_torch = ("also_train", "dropout", "invocation", "quantise", *names_of(StartOptions))
    refuse_given(model, (*of_torch, *of_capture))
    options = OnnxInsertOptions(
        plan=targets.plan,
        rank=targets.rank,
        alpha=targets.alpha,
        include=targets.include,
        exclude=targets.exclude,
        variant=targets.variant,
        init=targets.init,
        seed=targets.seed,
        dead=targets.dead,
        inputs=arrays,
        force=force,
    )
    report = insert_into_file(model, output, options)
    note(*report.warnings, warns=True)
    count = len(report.details["targets"])
    trained = report.details["trained"]
    size = f"{counted(count, 'target')}, {counted(trained, 'element')} to train"
    summary = f"{size}\n{report}\nwrote {output}"
    emit(summary, **{**report.to_json(), "inputs": [{"model": model}]})
