"""lora-fx export: a model as an ONNX file, adapters folded in or switchable, proven equal."""

from __future__ import annotations

from typing import Any

import click

from lora_fx.cli import options as shared
from lora_fx.cli.common import ReportCommand
from lora_fx.cli.output import emit, note, table, wrote


@click.command("export", cls=ReportCommand, no_say=shared.PROGRAM)
@click.argument("model")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER[:W]]...")
@shared.output_option("X.onnx", "The file to write.")
@click.option("--mode", default="merged", help="merged, switch, load, batch or train.")
@shared.selectors_option("--include", "Of switch, load, train: targets.")
@shared.selectors_option("--exclude", "Of switch, load, train: leave out.")
@click.option("--rank", type=int, help="Of load: the largest; of train, 8.")
@click.option("--loss", help="Of train: ce, mse or module:function.")
@click.option("--optimizer", help="Of train: adamw or sgd.")
@click.option("--weight-decay", type=float, help="Of train: 0.01 without it.")
@click.option("--clip", type=float, help="Of train: longest gradient (norm), 1; 0 for any.")
@shared.flag_option("--scales", "Of batch: an input of weights by row.")
@click.option("--provider", default="auto", help="auto, cpu or cuda.")
@click.option("--opset", type=int, default=20, help="ONNX operator set.")
@shared.flag_option("--optimise", "Rewrite the graph for ONNX Runtime, proven equal.")
@shared.text_option("--precision", "DTYPE", "float16 or int8; of a bfloat16 model, float32 too.")
@shared.quantise_option
@click.option("--accuracy-level", type=int, default=0, help="Of int4, int8 codes: 4 has x in int8.")
@click.option("--tol", type=float, metavar="REL", help="Accept rounding over its gate, up to this.")
@shared.flag_option("--cache", "Of a decoder: its key-value cache goes in and out.")
@shared.text_option("--genai", "DIR", "Of --cache: also a folder for onnxruntime-genai.")
@shared.flag_option("--within", "Leave out what fails at sizes outside `ranges`.")
@click.option("--map", "names", metavar="FILE", help="Of .onnx: JSON, adapter key to tensor.")
@shared.text_option("--triton", "DIR", "Also into a model repository of Triton.")
@click.option("--max-batch", type=int, metavar="N", help="Of --triton: rows of one batch.")
@shared.model_options
@shared.force_option
def command(model: str, adapters: tuple[str, ...], output: str, mode: str, **options: Any) -> None:
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
    from lora_fx.errors import LoraFxError
    from lora_fx.files.atomic import check_output
    from lora_fx.passes.verbs.export import export
    from lora_fx.passes.verbs.modes import BY_NAME, field_names
    from lora_fx.passes.verbs.options import check_adapters

    if not output.endswith(".onnx"):
        raise LoraFxError(f"{output} does not end in .onnx", "-o model.onnx")
    check_output(output, force=options["force"])
    if mode == "merged" and len(adapters) > 1:
        raise LoraFxError(
            f"merged takes one adapter, not {len(adapters)}", "--mode switch or batch"
        )
    opset, names = options.pop("opset"), options.pop("names")
    updates, loss = shared.named_adapters(adapters), options.pop("loss")
    if updates and not (mode == "merged" and model.endswith(".onnx")):
        check_adapters(updates, mode)
    options["repeat"] = not options["no_repeat"]
    options["loss"] = loss and shared.loss_of(loss)
    given = {k: options.pop(k) for k in shared.CAPTURE}
    options["adapters"] = next(iter(updates.values()), None) if mode == "merged" else updates
    options |= {"mode": mode, "inputs": shared.load_npz(given["inputs_file"]) or None}
    if mode in BY_NAME:
        kind = BY_NAME[mode]
        options["mode"] = kind(**{name: options.pop(name) for name in field_names(kind)})
    if model.endswith(".onnx"):
        from lora_fx.onnx.match import read_map

        own = [n for n in shared.CAPTURE if n != "inputs_file"]
        shared.refuse_given(model, ("opset", *own, "quantise", "accuracy_level"))
        report = export(model, output, names=read_map(names), **options)
        inputs = [{"model": model}]
        note(*report.warnings, warns=True)
    else:
        if names:
            raise LoraFxError("--map is of .onnx files", "a model's own names tell")
        _, cap = shared.captured(model, given, cache=options["cache"])
        report = export(cap, output, opset=opset, **options)
        inputs = cap.inputs.to_json()
    said = f"{report}{table(report)}\n{wrote(report)}"
    emit(said, **{**report.to_json(), "inputs": inputs})
